"""Conversations -> renderings, by the job's declared format or by the chat template of the model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Protocol

from finetune_api.outcome import Reason
from finetune_api.prompt_format import HuggingFaceChatTemplate, Message, PromptFormat, PromptFormatSpec, Rendering, Turn
from finetune_trainer.data.conversation import CALLS, TOOLS, Conversation, RowError
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.errors import JobError

_PROBE = "What is 1+1?"

_DATE_FUNCTION = "strftime_now"
"""What templates call for today's date; transformers has a clock behind it, and takes no function in its place."""

Tools = Sequence[Mapping[str, Any]]

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FIELDS = (*_THOUGHTS, "tool_call_id", "name")
"""What a chat template is given of a message, besides role, content and tool calls."""
_USUAL, _WITH_TOOLS = "default", "tool_use"
"""transformers' names for two of several templates."""

_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%"
"""Letters that strftime replaces behind a %, the last one after the others."""


class Renderer(Protocol):
    """Makes texts of conversations; several per conversation where one text cannot begin with every turn's prompt."""

    portable: bool
    """Whether another process may have it: one that would have to import transformers for it takes long to start."""

    bos: str | None
    """What the tokenizer puts before a text by itself, and a plain text is given therefore."""

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Rendering]:
        """The renderings of one conversation, the one with the whole text first.

        Args:
            messages: of the conversation.
            tools: schemas of the functions that the model is told of.

        Raises:
            RowError: the conversation cannot be rendered.
        """
        ...

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """The text that asks for the next assistant message."""
        ...


def renderings_of(renderer: Renderer, conversation: Conversation) -> list[Rendering]:
    """The renderings of a row: of its messages, or its text as it is.

    Raises:
        RowError: it cannot be rendered.
    """
    if conversation.text is not None:
        return [Rendering(conversation.text, ()).with_bos(renderer.bos)]
    return renderer.render(conversation.messages, conversation.tools)


class FormatRenderer:
    """Renders by a declared PromptFormat."""

    portable = True

    def __init__(self, prompt_format: PromptFormat, automatic_bos: str | None) -> None:
        self._format = prompt_format
        self.bos = automatic_bos

    def render(self, messages: Sequence[Message], _: Tools = ()) -> list[Rendering]:
        """One rendering: a declared format never rewrites what came before. Rows with tools do not come here."""
        if self._format.system_in_user:
            roles = {message.role for message in messages}
            if "system" in roles and "user" not in roles:
                raise RowError("has a system message and no user message to carry it (system_in_user).")
        return [self._format.render(messages).with_bos(self.bos)]

    def prompt(self, messages: Sequence[Message], _: Tools = ()) -> str:
        """The inference prompt after `messages`."""
        return Rendering(self._format.render_prompt(messages), ()).with_bos(self.bos).text


class TemplateRenderer:
    """Renders by the tokenizer's own chat template.

    Its text is taken as it is, without a BOS it does not write: whoever prompts with the template tokenizes its text
    without adding special tokens. Templates may rewrite earlier turns (drop their reasoning, say). The turns whose
    prompt the whole text does not begin with get a rendering of their own.
    """

    portable = False

    def __init__(
        self, tokenizer: Any, *, only_whole: bool = False, day: date | None = None, bos: str | None = None
    ) -> None:
        """The template of `tokenizer`.

        Args:
            tokenizer: transformers'.
            bos: what it puts before a text by itself.
            only_whole: no turn is told apart, since all of the text is trained on.
            day: what the template is told that asks for today's, at midnight; None for today's.

        Raises:
            JobError: InvalidSpec, there is no template, or it leaves out messages that are text.
        """
        if not tokenizer.chat_template:
            raise JobError(
                Reason.INVALID_SPEC,
                "generation_config.prompt_format asks for the tokenizer's chat template, but the model's tokenizer "
                "has none: write system, user and assistant formats instead.",
            )
        self.bos = bos
        self._tokenizer = tokenizer
        self._only_whole = only_whole
        own = tokenizer.chat_template
        # A tokenizer may have several.
        usual = own.get(_USUAL, next(iter(own.values()))) if isinstance(own, dict) else own
        with_tools = own.get(_WITH_TOOLS, usual) if isinstance(own, dict) else usual
        day = day or today()
        self._template, self._template_with_tools = (
            _dated(text, day) if asks_for_date(text) else text for text in (usual, with_tools)
        )
        self._check_writes_text()

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Rendering]:
        """The whole conversation, and each turn apart that it does not cover."""
        # One for the whole and for its beginnings, in which nothing may be called yet.
        template = self._template_for(messages, tools)
        whole = self._text(messages, tools, template)
        for name in _called(messages):
            if name not in whole:
                raise RowError(f"calls {name[:60]}, which the tokenizer's chat template does not write.")
        if self._only_whole:
            return [Rendering(whole, ())]
        turns, apart = [], []
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.trained:
                continue
            prompt = self._text(messages[:index], tools, template, add_generation_prompt=True)
            upto = whole if index == len(messages) - 1 else self._text(messages[: index + 1], tools, template)
            if whole.startswith(prompt) and whole.startswith(upto) and len(prompt) < len(upto):
                turns.append(Turn(len(prompt), len(upto)))
            elif upto.startswith(prompt) and len(prompt) < len(upto):
                apart.append(Rendering(upto, (Turn(len(prompt), len(upto)),)))
            else:
                raise RowError(
                    "cannot be rendered with the tokenizer's chat template: its text for the answer does not begin "
                    "with its own generation prompt; write a prompt_format instead."
                )
        return ([Rendering(whole, tuple(turns))] if turns or not apart else []) + apart[::-1]

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """The inference prompt after `messages`."""
        return self._text(messages, tools, self._template_for(messages, tools), add_generation_prompt=True)

    def _template_for(self, messages: Sequence[Message], tools: Tools) -> str:
        speaks_of_tools = bool(tools) or any(each.role == "tool" or CALLS in each.fields for each in messages)
        return self._template_with_tools if speaks_of_tools else self._template

    def _check_writes_text(self) -> None:
        """Templates of some multimodal models write nothing of a content that is a text and no list of parts."""
        try:
            text = self._text([Message("user", _PROBE)], (), self._template)
        except RowError:  # Rows are refused with the template's own words.
            return
        if _PROBE not in text:
            raise JobError(
                Reason.INVALID_SPEC,
                "The chat template of the model's tokenizer leaves out messages that are plain text: write system, "
                "user and assistant formats in generation_config.prompt_format instead.",
            )

    def _text(
        self, messages: Sequence[Message], tools: Tools, template: str, *, add_generation_prompt: bool = False
    ) -> str:
        if not messages:
            raise RowError("begins with an assistant message, which the tokenizer's chat template cannot prompt for.")
        plain = [{"role": message.role, "content": message.content, **message.fields} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                plain,
                tools=list(tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # Templates are foreign programs; jinja lets anything through.
            raise RowError(f"is refused by the tokenizer's chat template ({error}).") from error
        return str(text)


def _called(messages: Sequence[Message]) -> list[str]:
    """Names of the functions that are called."""
    calls = [call for message in messages for call in message.fields.get(CALLS, ())]
    return [str(call.get("function", call)["name"]) for call in calls]


def asks_for_date(template: object) -> bool:
    """Whether a chat template (its text, several by name, or None) may write today's date."""
    return _DATE_FUNCTION in str(template)


def takes_tools(template: object) -> bool:
    """Whether a chat template (its text, several by name, or None) writes tools and their calls."""
    text = str(template)
    return TOOLS in text and CALLS in text


def unwritten_fields(template: object) -> tuple[str, ...]:
    """Which of FIELDS a chat template does not know; the names of a thought stand for each other."""
    text = str(template)
    thinks = any(name in text for name in _THOUGHTS)
    return tuple(name for name in FIELDS if not (thinks if name in _THOUGHTS else name in text))


def _dated(template: str, day: date) -> str:
    """`template` with a macro in place of the function that asks the clock."""
    asked = [f"%{flag}{letter}" for letter in _DIRECTIVES for flag in ("-", "")]
    told = "".join(f" | replace({json.dumps(text)}, {json.dumps(day.strftime(text))})" for text in asked)
    # transformers takes the line break off, so that the template begins on a line of its own.
    return f"{{%- macro {_DATE_FUNCTION}(format) -%}}{{{{- format{told} -}}}}{{%- endmacro %}}\n{template}"


def today() -> date:
    """In UTC, so that all machines agree."""
    return datetime.now(UTC).date()


def make_renderer(
    prompt_format: PromptFormatSpec, model: ModelTokenizer, *, train_all: bool = False, day: date | None = None
) -> Renderer:
    """The renderer for a job's prompt format.

    Args:
        prompt_format: the job's.
        model: its tokenizer.
        train_all: every token is trained on, so that turns need not be told apart.
        day: what a chat template is told that asks for today's; None for today's.

    Raises:
        JobError: InvalidSpec, the tokenizer's chat template is asked for and there is none.
    """
    if isinstance(prompt_format, HuggingFaceChatTemplate):
        return TemplateRenderer(model.tokenizer, only_whole=train_all, day=day, bos=model.automatic_bos)
    return FormatRenderer(prompt_format, model.automatic_bos)
