"""A conversation that goes on begins with the text it had: what a server answers comes back as it was generated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune_api.answer_literals import TAG
from finetune_api.prompt_format import Message, PromptFormat, Rendering
from tests.api.formats import FORMATS, assistant, conversations, plain, prompt_formats, texts, user
from tests.api.test_chat_template import by_template

INST = PromptFormat(system="{instruction}", user="[INST] {instruction} [/INST]", assistant=" {instruction} </s>")
HEADED = PromptFormat(
    system="{instruction}", user="{instruction}", assistant="<|im_start|>bot\n{instruction}\n### End\n"
)
BARE = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}<|im_end|>\n")
TWO_TAGS = PromptFormat(system="{instruction}", user="{instruction}", assistant="<a>{instruction}</a> <|eot_id|>")

MESSAGES = [
    (INST, "safe", "safe"),
    (INST, " safe", "safe"),
    (INST, " safe ", "safe"),
    (INST, " safe </s>", "safe"),
    (INST, "safe </s>", "safe"),
    (INST, "safe</s>", "safe</s>"),
    (INST, "  safe  ", " safe "),
    (INST, "\tsafe\n", "\tsafe\n"),
    (INST, " ", ""),
    (HEADED, "<|im_start|>bot\nyes\n### End\n", "yes"),
    (HEADED, "<|im_start|>bot\nyes\n### End", "yes"),
    (HEADED, "bot\nyes\n", "yes"),
    (HEADED, "yes ###", "yes ###"),
    (BARE, "x = [1]\n", "x = [1]\n"),
    (BARE, "a <", "a <"),
    (BARE, "a<|im_end|>", "a"),
    (BARE, "a<|im_end|>\n", "a"),
    (TWO_TAGS, "<a>yes</a> ", "yes"),
    (TWO_TAGS, "<a>yes</a>", "yes"),
    (TWO_TAGS, "yes", "yes"),
]


@pytest.mark.parametrize(("made", "answer", "message"), MESSAGES)
def test_an_answer_without_what_the_format_writes_around_it(made: PromptFormat, answer: str, message: str) -> None:
    assert made.message(answer) == message


def visible(made: PromptFormat, generated: str) -> Iterator[str]:
    """What servers give a client of a generated answer: all before the stop that the end-of-turn has, or all of it."""
    tail = made.end_of_turn
    tag = TAG.search(tail)
    stop = tag[0] if tag else tail.strip() or tail
    before = len(generated) - len(tail) + tail.find(stop)
    # A message that contains the stop is never generated to its end.
    if generated.find(stop) == before:
        yield generated[:before]
        yield generated


def assert_goes_on(made: PromptFormat, messages: list[Message], bos: str | None) -> None:
    """Each answer of a trained conversation, sent back as it was generated, leaves the text as it was trained."""
    whole = made.render(messages).with_bos(bos)
    turns = iter(whole.turns)
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        turn = next(turns)
        generated = whole.text[turn.prompt_end : turn.end]
        for answer in visible(made, generated):
            history = [*messages[:index], assistant(answer), user("And now?")]
            prompt = Rendering(made.render_prompt(history), ()).with_bos(bos).text
            assert prompt.startswith(whole.text[: turn.prompt_end] + generated)
            assert by_template(made, plain(history), bos, prompt=True) == prompt
            again = made.render([*messages[:index], assistant(answer), *messages[index + 1 :]]).with_bos(bos)
            assert (again.text, again.turns) == (whole.text, whole.turns)


@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("made", [*FORMATS.values(), INST, HEADED, BARE, TWO_TAGS], ids=str)
def test_history_is_the_trained_text_in_a_published_format(made: PromptFormat, bos: str | None) -> None:
    for content in ("safe", " safe ", "  two\n lines \n", "a </s", "x", "", " "):
        assert_goes_on(made, [user("u"), assistant(content), user("v"), assistant("b")], bos)


@given(prompt_formats(), conversations(), st.sampled_from([None, "<s>"]))
def test_history_is_the_trained_text_in_any_format(
    made: PromptFormat, messages: list[Message], bos: str | None
) -> None:
    assert_goes_on(made, messages, bos)


@given(prompt_formats(), texts)
def test_a_message_that_brings_nothing_of_the_format_is_rendered_verbatim(made: PromptFormat, content: str) -> None:
    literals = made.literals
    assume(not content.startswith(literals.starts) and not content.endswith(literals.ends))
    assert made.message(content) == (content.strip() if made.strip_whitespace else content)


_FEW = st.lists(st.sampled_from(["a", "b", " ", "\n", "<s>", "</s>"]), max_size=4).map("".join)
"""Texts that often repeat each other."""


@given(_FEW, _FEW, st.integers(0, 8), st.lists(_FEW, min_size=1, max_size=3), st.booleans())
def test_history_is_the_trained_text_where_message_and_format_are_alike(
    head: str, tail: str, given_characters: int, contents: list[str], strip: bool
) -> None:
    made = PromptFormat(
        system="{instruction}",
        user="{instruction}",
        assistant=head + "{instruction}" + tail,
        trailing_assistant=head[:given_characters],
        strip_whitespace=strip,
    )
    assert_goes_on(made, [message for content in contents for message in (user("u"), assistant(content))], None)
