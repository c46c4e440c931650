"""Each rule by which a conversation becomes text, and what holds for any format and any conversation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.prompt_format import (
    Message,
    PromptFormat,
    RenderError,
    Rendering,
    Turn,
    missing_bos,
)
from tests.api.formats import (
    APART,
    IN_USER,
    assistant,
    conversations,
    prompt_formats,
    system,
    texts,
    user,
)

TAGS = {"add_system_tags_even_if_message_is_empty": True}
STRIP = {"strip_whitespace": True}
DEFAULT = {"default_system_message": "d"}
CHAT = [user("u1"), assistant("a1"), user("u2"), assistant("a2")]

RULES: list[tuple[str, dict[str, Any], list[Message], str]] = [
    ("nothing is put between messages", APART, [user("u"), assistant("a")], "<U>u</U><A>a</A>"),
    ("bos comes once", {**APART, "bos": "<B>"}, CHAT[:3], "<B><U>u1</U><A>a1</A><U>u2</U>"),
    ("bos comes before the system message", {**APART, "bos": "<B>"}, [system("s"), user("u")], "<B><S>s</S><U>u</U>"),
    ("bos comes even before nothing", {**APART, "bos": "<B>"}, [], "<B>"),
    ("a system message further on moves to the front", APART, [user("u"), system("s")], "<S>s</S><U>u</U>"),
    ("no system message, no system text", APART, [user("u")], "<U>u</U>"),
    ("an empty system message is left out", APART, [system(""), user("u")], "<U>u</U>"),
    ("the default stands in", {**APART, **DEFAULT}, [user("u")], "<S>d</S><U>u</U>"),
    ("a given system message overrides it", {**APART, **DEFAULT}, [system("s"), user("u")], "<S>s</S><U>u</U>"),
    ("an empty one suppresses it", {**APART, **DEFAULT}, [system(""), user("u")], "<U>u</U>"),
    ("tags around no system message", {**APART, **TAGS}, [user("u")], "<S></S><U>u</U>"),
    ("tags around an empty one", {**APART, **TAGS}, [system(""), user("u")], "<S></S><U>u</U>"),
    ("tags around an empty one, not the default", {**APART, **TAGS, **DEFAULT}, [system("")], "<S></S>"),
    ("tags around the default", {**APART, **TAGS, **DEFAULT}, [user("u")], "<S>d</S><U>u</U>"),
    ("the first user has the system", IN_USER, [system("s"), *CHAT[:3]], "<U><S>s</S>u1</U><A>a1</A><U>u2</U>"),
    ("also when it comes later", IN_USER, [*CHAT[:3], system("s")], "<U><S>s</S>u1</U><A>a1</A><U>u2</U>"),
    ("also after an answer", IN_USER, [system("s"), assistant("a"), user("u")], "<A>a</A><U><S>s</S>u</U>"),
    ("in user: no system message, nothing", IN_USER, [user("u")], "<U>u</U>"),
    ("in user: the default", {**IN_USER, **DEFAULT}, CHAT[:3], "<U><S>d</S>u1</U><A>a1</A><U>u2</U>"),
    ("in user: a given one overrides it", {**IN_USER, **DEFAULT}, [system("s"), user("u")], "<U><S>s</S>u</U>"),
    ("in user: an empty one keeps its tags", IN_USER, [system(""), user("u")], "<U><S></S>u</U>"),
    ("in user: and suppresses the default", {**IN_USER, **DEFAULT}, [system(""), user("u")], "<U><S></S>u</U>"),
    ("in user: tags around none", {**IN_USER, **TAGS}, CHAT[:3], "<U><S></S>u1</U><A>a1</A><U>u2</U>"),
    (
        "in user: {system} may come after {instruction}",
        {**IN_USER, "user": "<U>{instruction}{system}</U>"},
        [system("s"), user("u")],
        "<U>u<S>s</S></U>",
    ),
    (
        "system_in_last_user changes nothing",
        {**IN_USER, "system_in_last_user": True},
        [system("s"), *CHAT[:3]],
        "<U><S>s</S>u1</U><A>a1</A><U>u2</U>",
    ),
    ("white space is kept", APART, [system(" s\n"), user("\tu "), assistant(" ")], "<S> s\n</S><U>\tu </U><A> </A>"),
    ("or stripped", {**APART, **STRIP}, [system(" s\n"), user("\tu "), assistant("\xa0a")], "<S>s</S><U>u</U><A>a</A>"),
    ("the default too", {**APART, **STRIP, "default_system_message": " d "}, [user("u")], "<S>d</S><U>u</U>"),
    ("not the format itself", {**APART, **STRIP, "user": " {instruction} ", "bos": " "}, [user(" u ")], "  u "),
    ("a blank system message is not an empty one", {**APART, **STRIP}, [system(" "), user("u")], "<S></S><U>u</U>"),
    ("in user: not the system", {**IN_USER, **STRIP}, [system(" s "), user(" u ")], "<U><S> s </S>u</U>"),
    ("roles need not alternate", APART, [assistant("a"), user("u"), user("v")], "<A>a</A><U>u</U><U>v</U>"),
    (
        "braces in messages are text",
        APART,
        [user("{instruction} {{x}} {"), assistant("{0}")],
        "<U>{instruction} {{x}} {</U><A>{0}</A>",
    ),
    (
        "in system messages too",
        IN_USER,
        [system("{instruction}{system}"), user("{system}")],
        "<U><S>{instruction}{system}</S>{system}</U>",
    ),
    ("doubled braces are literal", {**APART, "user": "{{{instruction}}}{{}}"}, [user("u")], "{u}{}"),
    (
        "a doubled placeholder beside a real one",
        {**APART, "user": "{{instruction}}: {instruction}"},
        [user("u")],
        "{instruction}: u",
    ),
    ("other keys are verbatim", {**APART, "bos": "{{b}}", "default_system_message": "{d}"}, [], "{{b}}<S>{d}</S>"),
]


@pytest.mark.parametrize(("keys", "messages", "text"), [case[1:] for case in RULES], ids=[case[0] for case in RULES])
def test_rule(keys: dict[str, Any], messages: list[Message], text: str) -> None:
    assert PromptFormat(**keys).render(messages).text == text


def test_keys_that_are_not_written_have_llmforges_defaults_except_that_white_space_is_kept() -> None:
    assert PromptFormat(**APART).model_dump(exclude=set(APART)) == {
        "trailing_assistant": "",
        "bos": "",
        "default_system_message": "",
        "system_in_user": False,
        "system_in_last_user": False,
        "add_system_tags_even_if_message_is_empty": False,
        "strip_whitespace": False,
    }


@pytest.mark.parametrize("messages", [[], [user("u")], [user("u"), assistant("a")]])
def test_trailing_assistant_ends_every_prompt_and_no_training_text(messages: list[Message]) -> None:
    made = PromptFormat(**APART, trailing_assistant="<A>")
    assert made.render_prompt(messages) == made.render(messages).text + "<A>"
    assert made.render(messages).text == PromptFormat(**APART).render(messages).text


def test_trailing_assistant_is_verbatim() -> None:
    made = PromptFormat(**{**APART, "assistant": "{{A}} {instruction}</A>"}, trailing_assistant="{A}")
    assert made.render_prompt([user("u")]) == "<U>u</U>{A}"


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([system("s"), system("t")], "Only one system message can be given in a conversation."),
        ([system("s"), user("u"), system("s")], "Only one system message can be given in a conversation."),
        ([Message("tool", "t")], "Unknown role 'tool': roles are system, user and assistant."),
        ([Message("User", "u")], "Unknown role 'User': roles are system, user and assistant."),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(messages: list[Message], sentence: str) -> None:
    made = PromptFormat(**APART)
    for render in (made.render, made.render_prompt):
        with pytest.raises(RenderError) as caught:
            render(messages)
        assert str(caught.value) == sentence


# What holds for every format


@given(prompt_formats(), conversations())
def test_each_turn_is_prompted_with_what_precedes_it_in_training(made: PromptFormat, messages: list[Message]) -> None:
    whole = made.render(messages)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    assert len(whole.turns) == len(answers)
    for turn, index in enumerate(answers):
        assert whole.inference_prompt(turn) == made.render_prompt(messages[:index])


@given(prompt_formats(), conversations())
def test_each_turn_must_produce_its_message_and_end_of_turn(made: PromptFormat, messages: list[Message]) -> None:
    whole = made.render(messages)
    answers = [message.content for message in messages if message.role == "assistant"]
    for turn, content in zip(whole.turns, answers, strict=True):
        written = made.assistant.format(instruction=made.message(content))
        assert made.trailing_assistant + whole.text[turn.prompt_end : turn.end] == written
        assert written.endswith(made.end_of_turn)


@given(prompt_formats(), conversations(), st.sampled_from([None, "", "<s>", "<|begin_of_text|>"]))
def test_one_bos_leads_and_the_turns_keep_their_text(
    made: PromptFormat, messages: list[Message], automatic_bos: str | None
) -> None:
    bare = made.render(messages)
    whole = bare.with_bos(automatic_bos)
    assert whole.text in (bare.text, (automatic_bos or "") + bare.text)
    assert whole.text.startswith(automatic_bos or "")
    assert [whole.text[turn.prompt_end : turn.end] for turn in whole.turns] == [
        bare.text[turn.prompt_end : turn.end] for turn in bare.turns
    ]
    assert whole.with_bos(automatic_bos) == whole


@pytest.mark.parametrize(
    ("text", "automatic_bos", "added"),
    [
        ("hello", None, ""),
        ("hello", "", ""),
        ("hello", "<s>", "<s>"),
        ("<s>hello", "<s>", ""),
        ("<s> hello", "<s>", ""),
        (" <s>hello", "<s>", "<s>"),
        ("<s>hello", "<|begin_of_text|>", "<|begin_of_text|>"),
        ("", "<s>", "<s>"),
    ],
)
def test_a_bos_is_added_if_and_only_if_the_text_lacks_the_tokenizers(
    text: str, automatic_bos: str | None, added: str
) -> None:
    assert missing_bos(text, automatic_bos) == added
    assert Rendering(text, (Turn(0, len(text)),)).with_bos(automatic_bos) == Rendering(
        added + text, (Turn(len(added), len(added) + len(text)),)
    )


@given(texts)
@example("{")
def test_doubled_braces_bring_any_literal_text_through(literal: str) -> None:
    doubled = literal.replace("{", "{{").replace("}", "}}")
    made = PromptFormat(**{**APART, "user": doubled + "{instruction}" + doubled})
    assert made.render([user("u")]).text == literal + "u" + literal
