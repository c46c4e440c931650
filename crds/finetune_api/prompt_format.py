"""From chat messages to the exact text a model is trained on and later prompted with.

Training, preview, the adapter's chat template and chat all call `PromptFormat.render`; there is no second place that
knows how a conversation becomes text. The keys and their meaning are LLMForge's.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune_api.answer_literals import MOST_BORDERS, AnswerLiterals, answer_literals, borders

TEMPLATE_LIMIT = 16_384
"""Longest template text in characters; the longest published one has 1 300."""

Template = Annotated[str, Field(max_length=TEMPLATE_LIMIT)]

SHORTEST_STOP_TEXT = 3
"""Characters, white space around them aside, from which a text may end an answer; shorter ones are within answers."""


class RenderError(ValueError):
    """A conversation that this format cannot render; the text is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    """system, user or assistant; tool where a chat template knows it."""
    content: str
    trained: bool = True
    """Whether the model is to learn to produce it, if it is the assistant's."""
    fields: Mapping[str, Any] = dataclass_field(default_factory=dict, hash=False)
    """What else a chat template is given of it: its tool calls, say."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model must produce for one assistant message, as character positions in the rendered text."""

    prompt_end: int
    """End of the inference prompt of this turn: `text[:prompt_end]` is what the model is given."""
    end: int
    """End of the assistant's part, its end-of-turn included."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, with the stretches that the model must produce."""

    text: str
    turns: tuple[Turn, ...]
    brought: bool = False
    """Whether an answer brought text along that the format writes around it."""

    def inference_prompt(self, turn: int = -1) -> str:
        """The text the model is given when it is to produce turn number `turn`."""
        return self.text[: self.turns[turn].prompt_end]

    def with_bos(self, automatic_bos: str | None) -> Rendering:
        """The same with exactly one leading BOS.

        Args:
            automatic_bos: the BOS text that the model's tokenizer adds by itself, or None when it adds none. It is
                put in front unless the text starts with it already.
        """
        added = missing_bos(self.text, automatic_bos)
        if not added:
            return self
        shift = len(added)
        turns = tuple(Turn(turn.prompt_end + shift, turn.end + shift) for turn in self.turns)
        return Rendering(added + self.text, turns, self.brought)


def missing_bos(text: str, automatic_bos: str | None) -> str:
    """What must be put in front of `text` so that it starts with exactly one BOS: the BOS or nothing."""
    return automatic_bos if automatic_bos and not text.startswith(automatic_bos) else ""


class PromptFormat(BaseModel):
    """How each role's message is written. `{instruction}` stands for the message, as in Python's `str.format`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    system: Template = Field(
        min_length=1,
        description="system is the text of the system message; it contains {instruction} once. Literal braces are "
        "doubled: {{ and }}.",
    )
    user: Template = Field(
        min_length=1,
        description="user is the text of a user message; it contains {instruction} once, and {system} once when "
        "system_in_user is true.",
    )
    assistant: Template = Field(
        min_length=1,
        description="assistant is the text of an assistant message, its end-of-turn included; it contains "
        "{instruction} once. Everything in it after trailing_assistant is what the model learns to produce. A message "
        "that begins or ends with text of the format itself gets it once.",
    )
    trailing_assistant: Template = Field(
        default="",
        description="trailing_assistant is appended to a prompt at inference, verbatim. The assistant text must begin "
        "with it. Default: empty.",
    )
    bos: Template = Field(
        default="",
        description="bos is put in front of the whole prompt, verbatim. Default: empty; the model then still gets "
        "exactly one BOS if its tokenizer adds one.",
    )
    system_in_user: bool = Field(
        default=False,
        description="system_in_user renders the system message inside the first user message, where {system} stands. "
        "Default: false.",
    )
    default_system_message: Template = Field(
        default="",
        description="default_system_message is used for conversations without a system message. Default: empty.",
    )
    system_in_last_user: bool = Field(
        default=False,
        description="system_in_last_user is an inference-only key of LLMForge that moves the system message to the "
        "last user message. It is accepted with a warning and has no effect, because prompts would then differ from "
        "the training text. Default: false.",
    )
    add_system_tags_even_if_message_is_empty: bool = Field(
        default=False,
        description="add_system_tags_even_if_message_is_empty renders the system text around nothing when there is "
        "no system message. Default: false.",
    )
    strip_whitespace: bool = Field(
        default=False,
        description="strip_whitespace removes white space around each message before it is rendered (not around a "
        "system message that system_in_user moves). Default: false, so messages are rendered verbatim.",
    )

    @model_validator(mode="after")
    def _does_what_it_says(self) -> Self:
        for role in ("system", "user", "assistant"):
            _check_template(role, getattr(self, role), system_allowed=role == "user" and self.system_in_user)
        if self.system_in_user and "system" not in _fields(self.user):
            raise ValueError("user must contain {system} when system_in_user is true, or the system message is lost.")
        if self.system_in_last_user and not self.system_in_user:
            raise ValueError("system_in_last_user needs system_in_user: true.")
        head, tail = _around(self.assistant)
        if len(borders(tail)) > MOST_BORDERS:
            raise ValueError(
                "assistant has more tags and spaces after {instruction} than can be told apart: shorten the text with "
                f"which an answer ends to at most {MOST_BORDERS // 2} of them."
            )
        if not head.startswith(self.trailing_assistant):
            raise ValueError(
                f"trailing_assistant {self.trailing_assistant!r} is not how assistant begins ({head!r} comes before "
                "{instruction}), so the model would be prompted with a text it never saw in training: make the "
                "assistant text begin with it."
            )
        return self

    @property
    def literals(self) -> AnswerLiterals:
        """The format's own text around an assistant's message."""
        head, tail = _around(self.assistant)
        return answer_literals(head, tail, self.trailing_assistant)

    @property
    def end_of_turn(self) -> str:
        """Literal text after the assistant's message: what the model learns to stop with."""
        return self.literals.tail

    def message(self, answer: str) -> str:
        """An assistant's message as it is rendered: `answer` without the literals that the format writes around it."""
        return self._content(self.literals.without(answer))

    def warnings(self, stopping_sequences: Sequence[str] = ()) -> list[str]:
        """What this format does that its author may not expect, a sentence each.

        Args:
            stopping_sequences: the texts that are declared to end an answer.
        """
        found = []
        tail = self.end_of_turn
        if any(stop in tail for stop in stopping_sequences):
            pass
        elif not tail.strip():
            found.append(
                "assistant has no end-of-turn after {instruction}: unless every assistant message in the data ends "
                "with the model's end-of-sequence text itself, the model never learns to stop."
            )
        elif len(tail.strip()) < SHORTEST_STOP_TEXT:
            found.append(
                f"assistant ends with {tail!r}, which is too short to tell the end of an answer from its text: unless "
                "it is a special token of the model, nothing stops the model there; end it with the model's "
                "end-of-sequence text, or name it in stopping_sequences."
            )
        if self.system_in_last_user:
            found.append(
                "system_in_last_user has no effect: it changes prompts at inference only, so they would differ from "
                "the training text; the system message stays in the first user message."
            )
        verbatim = ("trailing_assistant", "bos", "default_system_message")
        found.extend(
            f"{key} is used verbatim: the placeholder in it is not replaced."
            for key in verbatim
            if "{instruction}" in getattr(self, key) or "{system}" in getattr(self, key)
        )
        return found

    def render(self, messages: Sequence[Message]) -> Rendering:
        """The text of a whole conversation, as it is trained on.

        Raises:
            RenderError: more than one system message, or a role other than system, user, assistant.
        """
        system, others = self._split_system(messages)
        pieces = [self.bos]
        if system is not None and not self.system_in_user:
            if system or self.add_system_tags_even_if_message_is_empty:
                pieces.append(self._fill(self.system, instruction=self._content(system)))
            system = None
        length = sum(map(len, pieces))
        turns, brought = [], False
        literals = self.literals
        for message in others:
            if message.role == "user":
                content = self._content(message.content)
                shown = "" if system is None else self._fill(self.system, instruction=system)
                piece = self._fill(self.user, instruction=content, system=shown)
                system = None
            else:
                brought = brought or literals.brought_by(message.content)
                piece = literals.head + self.message(message.content) + literals.tail
                if message.trained:
                    turns.append(Turn(length + len(self.trailing_assistant), length + len(piece)))
            pieces.append(piece)
            length += len(piece)
        return Rendering("".join(pieces), tuple(turns), brought)

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text that asks the model for the next assistant message after `messages`.

        Raises:
            RenderError: as `render`.
        """
        return self.render(messages).text + self.trailing_assistant

    def _split_system(self, messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
        """The system message (given, default or none) and the rest in order."""
        systems = [message.content for message in messages if message.role == "system"]
        if len(systems) > 1:
            raise RenderError("Only one system message can be given in a conversation.")
        others = [message for message in messages if message.role != "system"]
        for message in others:
            if message.role not in ("user", "assistant"):
                raise RenderError(f"Unknown role {message.role!r}: roles are system, user and assistant.")
        if systems:
            return systems[0], others
        if self.default_system_message or self.add_system_tags_even_if_message_is_empty:
            return self.default_system_message, others
        return None, others

    def _content(self, content: str) -> str:
        return content.strip() if self.strip_whitespace else content

    @staticmethod
    def _fill(template: str, **values: str) -> str:
        return template.format(**values)


class HuggingFaceChatTemplate(BaseModel):
    """The alternative to a declared format: the chat template that comes with the model's tokenizer."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    use_hugging_face_chat_template: Literal[True] = Field(
        description="use_hugging_face_chat_template renders conversations with the chat template of the model's own "
        "tokenizer."
    )


PromptFormatSpec = PromptFormat | HuggingFaceChatTemplate


@functools.lru_cache(maxsize=16)
def template_pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, name of the placeholder after it or None) in order.

    Raises:
        ValueError: braces that do not pair up, or a placeholder with a format of its own.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"the braces of {template!r} do not pair up ({error}): write {{{{ and }}}} for literal braces."
        ) from error
    for _, field, spec, conversion in parsed:
        if field is not None and (spec or conversion):
            raise ValueError(
                f"{{{field}}} in {template!r} takes no format or conversion: write it plainly, and literal braces as "
                "{{ and }}."
            )
    return tuple((literal, field) for literal, field, _, _ in parsed)


@functools.lru_cache(maxsize=16)
def _around(template: str) -> tuple[str, str]:
    """Literal text before and after the only placeholder."""
    head, tail = "", ""
    seen = False
    for literal, field in template_pieces(template):
        if seen:
            tail += literal
        else:
            head += literal
        seen = seen or field is not None
    return head, tail


def _fields(template: str) -> list[str]:
    return [field for _, field in template_pieces(template) if field is not None]


def _check_template(role: str, template: str, *, system_allowed: bool) -> None:
    """Raises ValueError, with the reason, for a template that would lose or repeat a message."""
    fields = _fields(template)
    if "instruction" not in fields:
        literal = "".join(text for text, _ in template_pieces(template))
        if "{instruction}" in literal:
            raise ValueError(
                f"{role} writes {{{{instruction}}}}, which is the literal text {{instruction}}, so the message would "
                "vanish: use single braces."
            )
        raise ValueError(f"{role} must contain {{instruction}}, where the message goes.")
    for field in sorted(set(fields)):
        if field == "system" and role == "user" and not system_allowed:
            raise ValueError("user contains {system}, which has a meaning only with system_in_user: true.")
        if field not in ("instruction", "system") or (field == "system" and not system_allowed):
            raise ValueError(
                f"{role} contains the unknown placeholder {{{field}}}: write {{{{{field}}}}} if the braces are meant "
                "literally."
            )
        if fields.count(field) > 1:
            raise ValueError(f"{role} contains {{{field}}} {fields.count(field)} times: each message goes in once.")
