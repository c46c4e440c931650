"""Each rule by which a conversation becomes text, and the formats that were published with their asserted texts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api.prompt_format import (
    TEMPLATE_LIMIT,
    HuggingFaceChatTemplate,
    Message,
    PromptFormat,
    RenderError,
    Rendering,
    Turn,
    missing_bos,
    template_pieces,
)
from tests.api.formats import (
    FORMATS,
    GUARD_2,
    GUARD_2_END_OF_TEXT,
    LLAMA_3,
    MISTRAL,
    assistant,
    conversations,
    native_format,
    prompt_formats,
    system,
    texts,
    user,
)

APART: dict[str, Any] = {
    "system": "<S>{instruction}</S>",
    "user": "<U>{instruction}</U>",
    "assistant": "<A>{instruction}</A>",
}
"""A format that shows where each part begins and ends."""

IN_USER: dict[str, Any] = {**APART, "user": "<U>{system}{instruction}</U>", "system_in_user": True}
"""The same with the system message inside the first user message."""

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
    ("braces in messages are text", APART, [user("{instruction} {{x}} {"), assistant("{0}")], "<U>{instruction} {{x}} {</U><A>{0}</A>"),
    ("in system messages too", IN_USER, [system("{instruction}{system}"), user("{system}")], "<U><S>{instruction}{system}</S>{system}</U>"),
    ("doubled braces are literal", {**APART, "user": "{{{instruction}}}{{}}"}, [user("u")], "{u}{}"),
    ("a doubled placeholder beside a real one", {**APART, "user": "{{instruction}}: {instruction}"}, [user("u")], "{instruction}: u"),
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


# Published formats

FIVE = [system("hello1"), user("hello2"), assistant("hello3"), user("hello4"), assistant("hello5")]

ASSERTED = [
    (
        "meta-llama/Llama-2-7b-chat-hf",
        "[INST] <<SYS>>\nhello1\n<</SYS>>\n\nhello2 [/INST] hello3 </s><s>[INST] hello4 [/INST] hello5 </s><s>",
    ),
    (
        "mistralai/Mistral-7B-Instruct-v0.1",
        "[INST] hello1 + hello2 [/INST]hello3</s> [INST] hello4 [/INST]hello5</s> ",
    ),
]


@pytest.mark.parametrize(("model_id", "text"), ASSERTED)
def test_renderings_that_llmforges_own_tests_assert(model_id: str, text: str) -> None:
    assert native_format(model_id).render(FIVE).text == text


@pytest.mark.parametrize("name", FORMATS)
def test_the_prompt_for_an_answer_is_a_prefix_of_the_training_text(name: str) -> None:
    made = FORMATS[name]
    whole = made.render(FIVE)
    prompt = made.render_prompt(FIVE[:4])
    assert whole.text.startswith(prompt)
    assert whole.inference_prompt() == prompt
    assert whole.inference_prompt(0) == made.render_prompt(FIVE[:2])


@pytest.mark.parametrize("name", FORMATS)
def test_a_published_format_is_accepted_as_it_would_be_from_a_file(name: str) -> None:
    made = FORMATS[name]
    assert PromptFormat.model_validate(made.model_dump()) == made


@pytest.mark.parametrize("name", set(FORMATS) - {"amazon/LightGPT"})
def test_a_published_format_is_accepted_without_a_warning(name: str) -> None:
    assert FORMATS[name].warnings() == []


def test_the_guides_llama_guard_row_is_concatenated_verbatim() -> None:
    policy = "<|begin_of_text|>[INST] Task: Check if there is unsafe content in 'User' messages ...\n\nO1: Violence.\n\n"
    question = "Provide your safety assessment for ONLY THE LAST User in the above conversation:\n- ... [/INST]"
    row = [system(policy), user(question), assistant("unsafe\nO3")]
    assert GUARD_2.render(row).text == policy + question + "unsafe\nO3 </s>"
    assert GUARD_2.render_prompt(row[:2]) == policy + question
    assert GUARD_2_END_OF_TEXT.render(row).text == policy + question + "unsafe\nO3<|end_of_text|>"
    assert GUARD_2.render(row).with_bos("<|begin_of_text|>").text == GUARD_2.render(row).text


def test_the_guides_llama_3_example() -> None:
    conversation = [
        system("You are a helpful assistant"),
        user("What's the value of 1+1?"),
        assistant("The value is 2"),
    ]
    prompt = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat's the value of 1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert LLAMA_3.render(conversation).text == prompt + "The value is 2<|eot_id|>"
    assert LLAMA_3.render_prompt(conversation[:2]) == prompt


def test_the_guides_mistral_format() -> None:
    assert MISTRAL.render(FIVE).text == (
        "<s>[INST] hello1 + hello2 [/INST] hello3</s>[INST] hello4 [/INST] hello5</s>"
    )
    assert MISTRAL.render_prompt(FIVE[:2]) == "<s>[INST] hello1 + hello2 [/INST]"


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
        shown = content.strip() if made.strip_whitespace else content
        written = made.assistant.format(instruction=shown)
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


# Formats that cannot do what they say

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"user": "hello"}, "user must contain {instruction}, where the message goes."),
    ({"assistant": "</s>"}, "assistant must contain {instruction}, where the message goes."),
    (
        {"user": "[INST] {{instruction}}"},
        "user writes {{instruction}}, which is the literal text {instruction}, so the message would vanish: use single "
        "braces.",
    ),
    ({"assistant": "{{instruction}}</s>"}, "assistant writes {{instruction}}"),
    ({"system": "{{{{instruction}}}}"}, "system writes {{instruction}}"),
    ({"user": "{instruction} {instruction}"}, "user contains {instruction} 2 times: each message goes in once."),
    ({"assistant": "{instruction}{instruction}{instruction}"}, "assistant contains {instruction} 3 times"),
    ({"user": "{system}{instruction}"}, "user contains {system}, which has a meaning only with system_in_user: true."),
    ({"system": "{system}{instruction}"}, "system contains the unknown placeholder {system}"),
    ({"assistant": "{system}{instruction}"}, "assistant contains the unknown placeholder {system}"),
    ({"assistant": "{instruction}{system}", "system_in_user": True}, "assistant contains the unknown placeholder"),
    (
        {"user": "{instruction}{role}"},
        "user contains the unknown placeholder {role}: write {{role}} if the braces are meant literally.",
    ),
    ({"user": "{}{instruction}"}, "user contains the unknown placeholder {}: write {{}} if"),
    ({"user": "{instruction}{instruction.x}"}, "unknown placeholder {instruction.x}"),
    ({"user": "{instruction[0]}"}, "user must contain {instruction}"),
    (
        {"user": "{instruction:>9}"},
        "{instruction} in '{instruction:>9}' takes no format or conversion: write it plainly, and literal braces as {{ "
        "and }}.",
    ),
    ({"user": "{instruction!r}"}, "takes no format or conversion: write it plainly"),
    ({"user": '{"content": "{instruction}"}'}, "literal braces as {{ and }}."),
    ({"user": "{instruction"}, "do not pair up (expected '}' before end of string): write {{ and }} for literal"),
    ({"user": "{instruction} }"}, "do not pair up (Single '}' encountered in format string)"),
    ({"user": "{ {instruction}"}, "the braces of '{ {instruction}' do not pair up"),
    (
        {"system_in_user": True},
        "user must contain {system} when system_in_user is true, or the system message is lost.",
    ),
    ({"system_in_user": True, "user": "{{system}}{instruction}"}, "user must contain {system}"),
    ({"system_in_user": True, "user": "{system}{system}{instruction}"}, "user contains {system} 2 times"),
    ({"system_in_last_user": True}, "system_in_last_user needs system_in_user: true."),
    (
        {"trailing_assistant": "<bot>"},
        "trailing_assistant '<bot>' is not how assistant begins ('<A>' comes before {instruction}), so the model would "
        "be prompted with a text it never saw in training: make the assistant text begin with it.",
    ),
    ({"trailing_assistant": "<A> "}, "trailing_assistant '<A> ' is not how assistant begins"),
    ({"trailing_assistant": "{{A}}", "assistant": "{{A}}{instruction}"}, "trailing_assistant '{{A}}' is not how"),
    ({"user": ""}, "at least 1 character"),
    ({"user": "{instruction}" + "x" * TEMPLATE_LIMIT}, f"at most {TEMPLATE_LIMIT} characters"),
    ({"bos": "x" * (TEMPLATE_LIMIT + 1)}, f"at most {TEMPLATE_LIMIT} characters"),
    ({"bos": None}, "valid string"),
    ({"system_in_user": "yes"}, "valid boolean"),
    ({"tool": "{instruction}"}, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("changes", "part"), REFUSED)
def test_a_format_that_cannot_do_what_it_says_is_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PromptFormat.model_validate(APART | changes)
    (problem,) = caught.value.errors()
    assert part in problem["msg"]


@pytest.mark.parametrize("key", ["system", "user", "assistant"])
def test_every_role_must_be_written(key: str) -> None:
    with pytest.raises(ValidationError, match="Field required"):
        PromptFormat.model_validate({name: text for name, text in APART.items() if name != key})


NEVER_STOPS = (
    "assistant has no end-of-turn after {instruction}: unless every assistant message in the data ends with the "
    "model's end-of-sequence text itself, the model never learns to stop."
)
NO_EFFECT = (
    "system_in_last_user has no effect: it changes prompts at inference only, so they would differ from the training "
    "text; the system message stays in the first user message."
)
WARNED: list[tuple[dict[str, Any], list[str]]] = [
    (APART, []),
    (IN_USER, []),
    ({**APART, "assistant": "<A>{instruction}"}, [NEVER_STOPS]),
    ({**APART, "assistant": "<A>{instruction} \n"}, [NEVER_STOPS]),
    ({**APART, "assistant": "{instruction}{{}}"}, []),
    ({**IN_USER, "system_in_last_user": True}, [NO_EFFECT]),
    ({**APART, "bos": "<s>{instruction}"}, ["bos is used verbatim: the placeholder in it is not replaced."]),
    (
        {**APART, "default_system_message": "{system}", "assistant": "{instruction}"},
        [NEVER_STOPS, "default_system_message is used verbatim: the placeholder in it is not replaced."],
    ),
    (
        {**APART, "assistant": "{{instruction}}{instruction}.", "trailing_assistant": "{instruction}"},
        ["trailing_assistant is used verbatim: the placeholder in it is not replaced."],
    ),
]


@pytest.mark.parametrize(("keys", "sentences"), WARNED)
def test_what_the_author_may_not_expect_is_a_warning(keys: dict[str, Any], sentences: list[str]) -> None:
    assert PromptFormat(**keys).warnings() == sentences


@pytest.mark.parametrize(
    ("template", "end_of_turn"),
    [("{instruction}</s>", "</s>"), ("<A>{instruction}", ""), ("{{a}}{instruction} {{b}} </s>", " {b} </s>")],
)
def test_the_end_of_turn_is_the_literal_text_after_the_message(template: str, end_of_turn: str) -> None:
    assert PromptFormat(**{**APART, "assistant": template}).end_of_turn == end_of_turn


def test_a_format_is_taken_apart_into_literals_and_placeholders() -> None:
    assert template_pieces("a{x}{{b}}{y}") == [("a", "x"), ("{", None), ("b}", None), ("", "y")]


@pytest.mark.parametrize("value", [False, "true", 1, None])
def test_the_tokenizers_template_is_asked_for_with_true_alone(value: Any) -> None:
    assert HuggingFaceChatTemplate(use_hugging_face_chat_template=True)
    with pytest.raises(ValidationError):
        HuggingFaceChatTemplate.model_validate({"use_hugging_face_chat_template": value})
