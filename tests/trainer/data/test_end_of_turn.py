"""Where an answer ends, for declared formats and chat templates alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.answer_literals import answer_literals
from finetune_api.generation import GenerationConfig
from finetune_api.prompt_format import Message, PromptFormat
from finetune_trainer.chat import _Reader
from finetune_trainer.data.conversation import RowError
from finetune_trainer.data.end_of_turn import AnswerStops, answer_stops, answer_tails
from finetune_trainer.data.format_warnings import format_warnings
from finetune_trainer.data.render import make_renderer
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.published.stops import Stops
from tests.api.formats import GUARD_2, LLAMA_3, MISTRAL
from tests.real_tokenizers import llama_3, mistral, published_templates, smollm2, with_template
from tests.trainer.data.declared import TEMPLATE, declared, named
from tests.trainer.run.tiny_job import CHATML

STOPS: list[tuple[Callable[[], ModelTokenizer], GenerationConfig, list[str], list[str]]] = [
    (llama_3, named(LLAMA_3), ["<|eot_id|>"], []),
    (llama_3, named(LLAMA_3, "<|end_of_text|>", "<|eot_id|>"), ["<|end_of_text|>", "<|eot_id|>"], []),
    (llama_3, named(GUARD_2, "</s>"), [], ["</s>"]),
    (llama_3, named(GUARD_2), [], ["</s>"]),
    (mistral, named(GUARD_2, "</s>"), ["</s>"], []),
    (mistral, named(MISTRAL), ["</s>"], []),
    (smollm2, named(PromptFormat.model_validate(CHATML), "<|im_end|>", "\nuser:"), ["<|im_end|>"], ["\nuser:"]),
    # One token, but ordinary text: a stop by id would also end an answer that merely says so.
    (smollm2, declared(assistant="{instruction} stop", stops=["stop"]), [], ["stop"]),
    (smollm2, declared(), [], []),
    (llama_3, declared(assistant="<answer>{instruction}</answer><|eot_id|>"), ["<|eot_id|>"], []),
    # Neither a tag nor a special token: all of what follows the answer, where it is long enough to tell.
    (smollm2, declared(assistant="{instruction}\n## End\n"), [], ["\n## End"]),
    (smollm2, declared(assistant="{instruction}.\n"), [], []),
    # What ends the answer need not look like a tag.
    (smollm2, declared(assistant="{instruction}<repo_name>x"), ["<repo_name>"], []),
]


@pytest.mark.parametrize(("tokenizer", "generation", "ids", "texts"), STOPS)
def test_stops_are_ids_where_they_are_special_tokens_and_else_texts(
    tokenizer: Callable[[], ModelTokenizer], generation: GenerationConfig, ids: list[str], texts: list[str]
) -> None:
    """The end of turn that is trained on is a stop whether or not it is declared as one."""
    model = tokenizer()
    found = answer_stops(model, generation)
    assert (found.token_ids, found.texts) == (model.tokenizer.convert_tokens_to_ids(ids), texts)


def test_declared_stopping_tokens_are_kept() -> None:
    """In front of those that were found, each once."""
    eot = llama_3().tokenizer.convert_tokens_to_ids("<|eot_id|>")
    generation = GenerationConfig(prompt_format=LLAMA_3, stopping_tokens=[7, eot])
    assert answer_stops(llama_3(), generation) == AnswerStops([7, eot], [], by_text=False)


def test_a_stop_that_is_a_special_token_by_another_spelling_than_tags_is_found() -> None:
    """As DeepSeek's, which is written with full-width bars."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    stop = "<｜end▁of▁sentence｜>"
    backend = type(smollm2().tokenizer.backend_tokenizer).from_str(smollm2().tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(stop, normalized=False, special=True)])
    model = ModelTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=stop), None)
    generation = declared(assistant="{instruction}" + stop)
    assert answer_stops(model, generation) == AnswerStops([backend.token_to_id(stop)], [], by_text=False)
    assert format_warnings(model, generation) == []


PUBLISHED = {
    "cohere2": "<|END_RESPONSE|>",
    "gemma3": "<end_of_turn>",
    # Other ends in the middle of a conversation; each turn is trained as the last one.
    "gptoss": "<|return|>",
    "glm4moe": None,
    "llama3_2": "<|eot_id|>",
    "phi3": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
}


@pytest.mark.parametrize(("name", "stop"), PUBLISHED.items())
def test_the_stop_of_a_published_template_is_found_beside_another_eos(name: str, stop: str | None) -> None:
    """The base model's eos is <|endoftext|>, which no answer is trained to end with."""
    model = published_templates()[name]
    ids = [] if stop is None else [model.tokenizer.convert_tokens_to_ids(stop)]
    assert answer_stops(model, TEMPLATE) == AnswerStops(ids, [], by_text=False)


def test_a_tag_that_is_an_added_token_gives_way_to_the_special_token_behind_it() -> None:
    """And white space, which some vocabularies have as added tokens, ends nothing."""
    from tokenizers import AddedToken

    model = published_templates()["qwen3"]
    backend = type(model.tokenizer.backend_tokenizer).from_str(model.tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("</answer>", normalized=False), AddedToken("\n\n", normalized=False)])
    tokenizer = type(model.tokenizer)(tokenizer_object=backend, eos_token="<|endoftext|>")
    fresh = ModelTokenizer(tokenizer, None)
    for end, stops in (("\n\n</answer><|im_end|>", ["<|im_end|>"]), ("\n\n</answer>", ["</answer>"]), ("\n\n", [])):
        found = answer_stops(fresh, declared(assistant="{instruction}" + end))
        assert found == AnswerStops([backend.token_to_id(stop) for stop in stops], [], by_text=False)


CONVERSATIONS = [
    ["user", "assistant"],
    ["system", "user", "assistant"],
    ["user", "assistant", "user", "assistant"],
]
ANSWERS = ["In Paris, on 3 May", "London"]
RUNS_ON = " and on and on"
"""What a model writes that was not stopped."""


def chats(model: ModelTokenizer, generation: GenerationConfig) -> list[tuple[str, bool]]:
    """(message as chat shows it, whether the model stopped) of a model that writes what it was trained to write."""
    assert generation.prompt_format is not None
    renderer = make_renderer(generation.prompt_format, model)
    found = answer_stops(model, generation)
    tails = answer_tails(renderer)
    literals = answer_literals("", tails[0] if tails else "", "")
    stops = Stops(tuple(found.token_ids), tuple(found.texts if found.by_text else ()), literals)
    shown = []
    for roles in CONVERSATIONS:
        answers = iter(ANSWERS)
        try:
            renderings = renderer.render([Message(r, next(answers) if r == "assistant" else "A text.") for r in roles])
        except RowError:
            continue
        for row in model.row_tokenizer().tokenize(renderings):
            for sequence in row.sequences:
                for first, end in sequence.spans:
                    shown.append(chat(model, sequence.ids[first:end], stops))
    return shown


def chat(model: ModelTokenizer, ids: list[int], stops: Stops) -> tuple[str, bool]:
    """The same of one answer's tokens."""
    reader = _Reader(model.tokenizer, stops, None)
    reader.put(torch.tensor([0]))  # The prompt.
    for token in [*ids, *model.ids(RUNS_ON)]:
        if not reader.ended:
            reader.put(torch.tensor([token]))
    return reader.finish(), reader.ended


def never_learns_to_stop(model: ModelTokenizer, generation: GenerationConfig) -> bool:
    """Whether the author is told so."""
    told = format_warnings(model, generation)
    if isinstance(generation.prompt_format, PromptFormat):
        told += generation.prompt_format.warnings(generation.stopping_sequences)
    return any("learns to stop" in sentence or "nothing stops the model" in sentence for sentence in told)


def check(model: ModelTokenizer, generation: GenerationConfig) -> None:
    """Every answer stops where it was trained to, whole and without its end-of-turn; or the author is warned."""
    shown = chats(model, generation)
    if never_learns_to_stop(model, generation):
        assert not all(stopped for _, stopped in shown)
        return
    for text, stopped in shown:
        assert stopped
        assert text.rstrip().endswith(tuple(ANSWERS))


ENDS = ["", "\n", ".", " END", "</s>", "<|im_end|>\n", "\n<|im_end|>", "<|eot_id|>", "</answer><|im_end|>"]
TEMPLATE_ENDS = [*(f"{{{{ {end!r} }}}}" for end in ENDS), "{{ eos_token }}"]
SYSTEM = ["{{ '<S>' + m['content'] + '\n' }}", "{{ raise_exception('no system') }}", ""]


@given(
    tokenizer=st.sampled_from([llama_3, mistral, smollm2]),
    last=st.sampled_from(TEMPLATE_ENDS),
    inner=st.sampled_from([None, *TEMPLATE_ENDS]),
    final=st.sampled_from(["", "{{ eos_token }}"]),
    content=st.sampled_from(["m['content']", "m['content'] | trim", "' ' + m['content']"]),
    system=st.sampled_from(SYSTEM),
    head=st.sampled_from(["<|im_start|>assistant\n", "[/INST]", "Answer:"]),
)
def test_what_a_template_trains_as_the_end_stops_the_model_or_is_warned_about(
    tokenizer: Callable[[], ModelTokenizer],
    last: str,
    inner: str | None,
    final: str,
    content: str,
    system: str,
    head: str,
) -> None:
    """Whatever it writes after the last answer, after an earlier one and at the very end."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}" + system + "{% elif m['role'] == 'user' %}"
        "{{ '<U>' + m['content'] + '\n' }}{% else %}{{ " + repr(head) + " }}{{ " + content + " }}"
        "{% if loop.last %}" + last + "{% else %}" + (last if inner is None else inner) + "{% endif %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
        + repr(head)
        + " }}{% else %}"
        + final
        + "{% endif %}"
    )
    check(with_template(tokenizer(), template), TEMPLATE)


@given(tokenizer=st.sampled_from([llama_3, mistral, smollm2]), end=st.sampled_from(ENDS), stop=st.sampled_from(ENDS))
def test_what_a_declared_format_trains_as_the_end_stops_the_model_or_is_warned_about(
    tokenizer: Callable[[], ModelTokenizer], end: str, stop: str
) -> None:
    """With and without a declared stop, which may be another than the end that is trained."""
    check(tokenizer(), declared([stop] if stop else [], assistant="{instruction}" + end))


def test_what_published_templates_train_as_the_end_stops_the_model_or_is_warned_about() -> None:
    """All those that TRL carries and that write what they are given."""
    rendered = 0
    for model in published_templates().values():
        try:
            check(model, TEMPLATE)
        except JobError:
            continue
        rendered += bool(chats(model, TEMPLATE))
    assert rendered > 25
