"""What a prompt format means to a model's tokenizer that the job's author may not expect, a sentence each."""

from __future__ import annotations

from finetune_api.answer_literals import TAG
from finetune_api.generation import GenerationConfig
from finetune_api.prompt_format import Message, PromptFormat, RenderError
from finetune_trainer.data.conversation import RowError
from finetune_trainer.data.end_of_turn import tails_of, trained_stop
from finetune_trainer.data.render import make_renderer
from finetune_trainer.data.tokenizer import ModelTokenizer


def format_warnings(model: ModelTokenizer, generation: GenerationConfig) -> list[str]:
    """What `generation` does with this tokenizer that `PromptFormat.warnings` cannot know.

    Raises:
        JobError: InvalidSpec, the tokenizer's chat template is asked for and there is none.
    """
    return _end_of_turn(model, generation) + _bos(model, generation)


def _end_of_turn(model: ModelTokenizer, generation: GenerationConfig) -> list[str]:
    stops = [trained_stop(model, generation, tail) for tail in tails_of(model, generation)]
    declared = isinstance(generation.prompt_format, PromptFormat)
    place = "assistant text" if declared else "tokenizer's chat template"
    eos = model.tokenizer.eos_token
    found = []
    for stop in dict.fromkeys(stops):
        # A text that the author has declared as a stop needs no word, unless it is meant as a special token.
        if isinstance(stop, str) and (stop not in generation.stopping_sequences or TAG.fullmatch(stop)):
            count = len(model.ids(stop))
            tokens = "an ordinary token" if count == 1 else f"{count} ordinary tokens"
            instead = f"; its own end-of-sequence token is {eos!r}" if eos else ""
            found.append(
                f"{stop!r} in the {place} is no special token of this model's tokenizer, which makes {tokens} of it: "
                f"the model learns to write it out and must be stopped by text{instead}."
            )
    # What ends no answer in a declared format is said without the tokenizer.
    if None in stops and not declared:
        some = "nothing" if len(set(stops)) == 1 else "in some conversations nothing"
        end = repr(eos) if eos else "an end-of-turn"
        found.append(
            f"the tokenizer's chat template writes {some} after an answer that could end it, so the model never learns "
            f"to stop there: declare a prompt_format whose assistant text ends with {end}, "
            "unless every assistant message in the data ends with it."
        )
    return found


def _bos(model: ModelTokenizer, generation: GenerationConfig) -> list[str]:
    prompt_format, bos = generation.prompt_format, model.tokenizer.bos_token
    if prompt_format is None or not bos:
        return []
    found = []
    if isinstance(prompt_format, PromptFormat):
        written = prompt_format.bos
        if written.strip() and written.strip() != bos and len(model.ids(written)) > 1:
            found.append(f"bos {written!r} is no special token of this model's tokenizer; its own is {bos!r}.")
    try:
        prompt = make_renderer(prompt_format, model).prompt([Message("user", "a")])
    except (RowError, RenderError):  # Rows are refused with the format's own words; here it only goes unwarned.
        return found
    if model.automatic_bos is not None and not prompt.startswith(model.automatic_bos):
        found.append(
            f"the tokenizer's chat template does not write the BOS {model.automatic_bos!r} that the tokenizer adds to "
            "plain text: rows are trained without it, since servers prompt with what the template writes."
        )
    return found
