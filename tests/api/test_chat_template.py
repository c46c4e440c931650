"""The Jinja chat template renders what the format renders, byte for byte, in the engine that transformers uses."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_api.chat_template import chat_template
from finetune_api.prompt_format import Message, PromptFormat, RenderError, Rendering
from tests.api.formats import FORMATS, assistant, conversations, escaped, plain, prompt_formats, system, texts, user

BOS = [None, "<s>", "<|begin_of_text|>"]
"""What tokenizers add by themselves."""


def raise_exception(message: str) -> NoReturn:
    """What transformers gives to templates under this name."""
    raise jinja2.TemplateError(message)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.globals["raise_exception"] = raise_exception


def by_template(
    made: PromptFormat, messages: list[dict[str, Any]], automatic_bos: str | None, *, prompt: bool = False
) -> str:
    """The messages rendered as `tokenizer.apply_chat_template` renders them."""
    template = compiled(chat_template(made, automatic_bos))
    return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt)


@functools.lru_cache
def compiled(template: str) -> jinja2.Template:
    """A template ready to be rendered; reading it costs far more than rendering."""
    return ENVIRONMENT.from_string(template)


def assert_same(made: PromptFormat, messages: list[Message], automatic_bos: str | None) -> None:
    """Template and format agree on training text and inference prompt."""
    text = made.render(messages).with_bos(automatic_bos).text
    assert by_template(made, plain(messages), automatic_bos) == text
    prompt = Rendering(made.render_prompt(messages), ()).with_bos(automatic_bos).text
    assert by_template(made, plain(messages), automatic_bos, prompt=True) == prompt


CONVERSATIONS = [
    [user("u1")],
    [system("s"), user("u1"), assistant("a1"), user("u2"), assistant("a2")],
    [user("u1"), assistant("a1"), system("s"), user("u2")],
    [system(""), user("u1"), assistant("a1")],
    [system(" s "), user(" u\n"), assistant("\ta ")],
    [assistant("a1"), user("u1"), user("u2")],
    [system('it\'s "{{ quoted }}" {% if x %}'), user("a\\b\\n"), assistant("{# no comment #}\r\n\u2028")],
    [user("<s>u1"), assistant("<|begin_of_text|>")],
    [],
]

BY_TEXT = {made.model_dump_json(): name for name, made in FORMATS.items()}
DISTINCT = {name: FORMATS[name] for name in BY_TEXT.values()}
"""One model of each published format."""

VARIATIONS: list[dict[str, Any]] = [
    {},
    {"default_system_message": "it's the \\default"},
    {"add_system_tags_even_if_message_is_empty": True},
    {"strip_whitespace": True},
    {"strip_whitespace": True, "default_system_message": " d ", "add_system_tags_even_if_message_is_empty": True},
]


@pytest.mark.parametrize("automatic_bos", BOS)
@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("made", DISTINCT.values(), ids=DISTINCT.keys())
def test_a_published_format(made: PromptFormat, variation: dict[str, Any], automatic_bos: str | None) -> None:
    made = made.model_copy(update=variation)
    for messages in CONVERSATIONS:
        assert_same(made, messages, automatic_bos)


@given(prompt_formats(), conversations(), st.sampled_from(BOS))
def test_any_format_and_conversation(made: PromptFormat, messages: list[Message], automatic_bos: str | None) -> None:
    assert_same(made, messages, automatic_bos)


JINJA = [
    "{{ 7 * 7 }}",
    "{% for x in 'abc' %}x{% endfor %}",
    "{# gone #}",
    "'}}{{ 7 * 7 }}{{'",
    "\\' ~ cycler ~ '",
    "-%}\n{%-",
]


def saying(literal: str) -> PromptFormat:
    """A format that has this text wherever a format may have one."""
    quoted = escaped(literal)
    return PromptFormat(
        system=f"{quoted}{{instruction}}{quoted}",
        user=f"{quoted}{{system}}{quoted}{{instruction}}{quoted}",
        assistant=f"{quoted}{{instruction}}{quoted}",
        trailing_assistant=literal,
        bos=literal,
        default_system_message=literal,
        system_in_user=True,
    )


def test_that_is_every_text_of_a_format() -> None:
    told = saying("zq9")
    texts = {name for name, field in PromptFormat.model_fields.items() if field.annotation in (str, str | None)}
    assert {name for name in texts if "zq9" in str(getattr(told, name))} == texts


@given(texts | st.sampled_from(JINJA), texts | st.sampled_from(JINJA), texts)
def test_any_literal_text_survives(literal: str, content: str, automatic_bos: str) -> None:
    assert_same(saying(literal), [user(content), assistant(content)], automatic_bos)


@pytest.mark.parametrize("text", JINJA)
def test_text_that_is_a_template_itself_is_not_run(text: str) -> None:
    rendered = by_template(saying(text), plain([user(text), assistant(text)]), None)
    # Around system message, question and answer, in front of it all, and each of them itself.
    assert rendered.count(text) == 10
    assert_same(saying(text), [user(text), assistant(text)], None)


@given(conversations(), prompt_formats(), st.integers(0, 6))
def test_a_system_message_in_any_place(messages: list[Message], made: PromptFormat, place: int) -> None:
    others = [message for message in messages if message.role != "system"]
    assert_same(made, [*others[:place], system("s"), *others[place:]], "<s>")


@given(prompt_formats(), st.sampled_from(BOS))
def test_a_templates_only_control_characters_are_its_own_line_ends(
    made: PromptFormat, automatic_bos: str | None
) -> None:
    template = chat_template(made, automatic_bos)
    # Line ends inside a template's texts would be at the mercy of every tool that copies the file.
    assert template.splitlines() == template.split("\n")
    assert all(character == "\n" or ord(character) >= 32 for character in template)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([system("s"), user("u"), system("t")], "Only one system message can be given in a conversation."),
        ([Message("tool", "t")], "Unknown role: roles are system, user and assistant."),
        ([Message("", "t")], "Unknown role: roles are system, user and assistant."),
    ],
)
def test_what_the_format_refuses_the_template_refuses(messages: list[Message], sentence: str) -> None:
    made = FORMATS["google/gemma-2-27b-it"]
    with pytest.raises(RenderError):
        made.render(messages)
    with pytest.raises(jinja2.TemplateError, match=sentence):
        by_template(made, plain(messages), None)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "user", "content": None},
        {"role": "assistant", "content": 1},
        {"role": "user"},
    ],
)
def test_a_content_that_is_not_text_is_refused_rather_than_printed(message: dict[str, Any]) -> None:
    with pytest.raises(jinja2.TemplateError, match="The content of a message must be text"):
        by_template(FORMATS["guard 2"], [message], None)


def test_a_message_without_a_role_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match="Unknown role"):
        by_template(FORMATS["guard 2"], [{"content": "u"}], None)


def test_rendering_twice_gives_the_same_since_the_template_keeps_nothing() -> None:
    template = ENVIRONMENT.from_string(chat_template(FORMATS["mistralai/Mistral-7B"], "<s>"))
    messages = plain([system("s"), user("u")])
    first = template.render(messages=messages, add_generation_prompt=True)
    assert template.render(messages=messages, add_generation_prompt=True) == first == "<s>[INST] s + u [/INST]"
