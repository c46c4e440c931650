"""Over several turns: what a server gave a client of an answer, sent back, makes the prompt ids that were trained.

Where one sequence of ids holds the whole row, the next prompt begins with the ids of the last one and what was
generated. It does not where a token reaches across the end of an answer (a row is then trained as several sequences).
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune_api.chat_template import chat_template
from finetune_api.generation import GenerationConfig
from finetune_api.prompt_format import Message, PromptFormat
from finetune_trainer.data.end_of_turn import answer_tails, trained_stop
from finetune_trainer.data.render import FormatRenderer
from finetune_trainer.data.tokenize import TokenizedRow
from finetune_trainer.data.tokenizer import ModelTokenizer
from tests.api.formats import FORMATS, assistant, plain, prompt_formats, user
from tests.trainer.data.test_render import with_template
from tests.trainer.data.test_tokenize import contents, decoded, row_of, spaceless
from tests.trainer.data.tokenizer_variants import REAL

ANSWERS = ["safe", " unsafe\nS1", "Two lines:\n\n- one\n- two", "é 🙂 ok.", "    return x", "yes ", "</answer", "  x  "]


def served(model: ModelTokenizer, prompt: list[int], generated: list[int], stop: int | str | None) -> str:
    """The content that a server answers with: what was generated without special tokens, up to the stop."""
    decode = model.tokenizer.decode
    before = decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = decode(prompt + generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = str(whole)[len(before) :]
    return text.split(stop)[0] if isinstance(stop, str) else text


def answers_of(row: TokenizedRow, stop: int | str | None) -> list[tuple[list[int], list[int]]]:
    """(prompt, generated up to the stop) ids of each turn, in order."""
    found = []
    for sequence in row.sequences:
        for first, end in sequence.spans:
            generated = sequence.ids[first:end]
            if isinstance(stop, int):
                generated = generated[: generated.index(stop) + 1]
            found.append((sequence.ids[:first], generated))
    return sorted(found, key=lambda ids: len(ids[0]))


def assert_ids_go_on(made: PromptFormat, model: ModelTokenizer, texts: list[str]) -> bool:
    """Whether there was something to compare: something ends the answers, and no earlier than where they end."""
    messages = [message for text in texts for message in (user("And?"), assistant(text))]
    row, rendering = row_of(made, model, messages)
    tails = answer_tails(FormatRenderer(made, model.automatic_bos))
    stop = trained_stop(model, GenerationConfig(prompt_format=made), tails[0])
    answers = answers_of(row, stop) if stop is not None else []
    if len(answers) != len(texts):
        return False
    trained = [rendering.text[turn.prompt_end : turn.end] for turn in rendering.turns]
    if spaceless(decoded(model, row.sequences[0].ids)) != spaceless(rendering.text):
        return False  # The tokenizer has no token for some of it.
    stop_text = stop if isinstance(stop, str) else model.tokenizer.added_tokens_decoder[stop].content
    tail = made.end_of_turn
    if any(text.find(stop_text) != len(text) - len(tail) + tail.find(stop_text) for text in trained):
        return False  # It would have ended earlier.
    exported = with_template(model, chat_template(made, model.automatic_bos))
    history: list[Message] = []
    for turn, (prompt, generated) in enumerate(answers):
        history.append(user("And?"))
        ids = exported.tokenizer.apply_chat_template(
            plain(history), tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"]
        assert ids == prompt
        history.append(assistant(served(model, prompt, generated, stop)))
        if turn + 1 < len(answers) and not row.retokenized:
            assert answers[turn + 1][0][: len(prompt) + len(generated)] == prompt + generated
    return True


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("made", FORMATS.values(), ids=FORMATS)
def test_published_formats(name: str, made: PromptFormat) -> None:
    model = REAL[name]()
    for first in ANSWERS:
        assert_ids_go_on(made, model, [first, "no", first])


def test_most_of_them_have_something_to_compare() -> None:
    compared = {
        (name, key): assert_ids_go_on(made, REAL[name](), ["safe", "no", "safe"])
        for name in REAL
        for key, made in FORMATS.items()
    }
    assert sum(compared.values()) > 0.9 * len(compared), [case for case, done in compared.items() if not done]


@settings(max_examples=100)
@given(st.sampled_from(sorted(REAL)), prompt_formats(), st.lists(contents, min_size=1, max_size=3))
def test_random_formats(name: str, made: PromptFormat, texts: list[str]) -> None:
    special = [token.content for token in REAL[name]().tokenizer.added_tokens_decoder.values()]
    # A special token before the end of an answer is not in what a server answers.
    assume(not any(token in text for token in special for text in (made.assistant.partition("{")[0], *texts)))
    assert_ids_go_on(made, REAL[name](), texts)
