"""A format that cannot do what it says is refused, and one that may surprise is warned about, each in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.prompt_format import (
    TEMPLATE_LIMIT,
    HuggingFaceChatTemplate,
    PromptFormat,
    template_pieces,
)
from tests.api.formats import (
    APART,
    IN_USER,
)

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"user": "hello"}, "user must contain {instruction}, where the message goes."),
    ({"assistant": "</s>"}, "assistant must contain {instruction}, where the message goes."),
    (
        {"user": "[INST] {{instruction}}"},
        (
            "user writes {{instruction}}, which is the literal text {instruction}, so the message would vanish: use "
            "single braces."
        ),
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
        (
            "{instruction} in '{instruction:>9}' takes no format or conversion: write it plainly, and literal braces "
            "as {{ and }}."
        ),
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
        (
            "trailing_assistant '<bot>' is not how assistant begins ('<A>' comes before {instruction}), so the model "
            "would be prompted with a text it never saw in training: make the assistant text begin with it."
        ),
    ),
    ({"trailing_assistant": "A>"}, "trailing_assistant 'A>' is not how assistant begins"),
    ({"trailing_assistant": "</A>"}, "trailing_assistant '</A>' is not how assistant begins"),
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
TOO_SHORT = (
    "assistant ends with {!r}, which is too short to tell the end of an answer from its text: unless it is a special "
    "token of the model, nothing stops the model there; end it with the model's end-of-sequence text, or name it in "
    "stopping_sequences."
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
    ({**APART, "assistant": "{instruction}{{}}"}, [TOO_SHORT.format("{}")]),
    ({**APART, "assistant": "{instruction} END\n"}, []),
    ({**IN_USER, "system_in_last_user": True}, [NO_EFFECT]),
    ({**APART, "bos": "<s>{instruction}"}, ["bos is used verbatim: the placeholder in it is not replaced."]),
    (
        {**APART, "default_system_message": "{system}", "assistant": "{instruction}"},
        [NEVER_STOPS, "default_system_message is used verbatim: the placeholder in it is not replaced."],
    ),
    (
        {**APART, "assistant": "{{instruction}}{instruction}.", "trailing_assistant": "{instruction}"},
        [TOO_SHORT.format("."), "trailing_assistant is used verbatim: the placeholder in it is not replaced."],
    ),
]


@pytest.mark.parametrize(("keys", "sentences"), WARNED)
def test_what_the_author_may_not_expect_is_a_warning(keys: dict[str, Any], sentences: list[str]) -> None:
    assert PromptFormat(**keys).warnings() == sentences


@pytest.mark.parametrize("tail", ["\n", ".", "\n\n"])
def test_an_end_of_turn_that_is_declared_as_a_stop_is_none_to_warn_of(tail: str) -> None:
    made = PromptFormat(**{**APART, "assistant": "{instruction}" + tail})
    assert made.warnings(["\nuser:", tail]) == []
    assert len(made.warnings(["\nuser:"])) == 1


@pytest.mark.parametrize(
    ("template", "end_of_turn"),
    [("{instruction}</s>", "</s>"), ("<A>{instruction}", ""), ("{{a}}{instruction} {{b}} </s>", " {b} </s>")],
)
def test_the_end_of_turn_is_the_literal_text_after_the_message(template: str, end_of_turn: str) -> None:
    assert PromptFormat(**{**APART, "assistant": template}).end_of_turn == end_of_turn


def test_a_format_is_taken_apart_into_literals_and_placeholders() -> None:
    assert template_pieces("a{x}{{b}}{y}") == (("a", "x"), ("{", None), ("b}", None), ("", "y"))


@pytest.mark.parametrize("value", [False, "true", None])
def test_the_tokenizers_template_is_asked_for_with_true_alone(value: Any) -> None:
    HuggingFaceChatTemplate.model_validate({"use_hugging_face_chat_template": True})
    with pytest.raises(ValidationError):
        HuggingFaceChatTemplate.model_validate({"use_hugging_face_chat_template": value})
