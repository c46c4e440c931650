"""`finetune chat`: asks a fine-tuned model, prompted with exactly the text it was trained on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.output import SHARED_CPU, OutputFormat, OutputOption, fail, print_json

if TYPE_CHECKING:
    from finetune_trainer.chat import ChatModel


def chat(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER_DIR", help="Adapter folder, or a whole model's folder.")],
    messages: Annotated[
        list[str] | None, typer.Option("--message", "-m", help="What to ask; one conversation. Repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Base model: folder, s3:// or Hub id. Default: the adapter's.")
    ] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Answer with the base model alone.")] = False,
    output: OutputOption = OutputFormat.TEXT,
) -> None:
    """Talk to a fine-tuned model: with --message once, otherwise until end of input (Ctrl-D)."""
    for name, value in {**SHARED_CPU, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    from finetune_trainer.chat import ChatModel
    from finetune_trainer.errors import JobError

    try:
        model = ChatModel.load(adapter, base_model=base_model, with_adapter=not no_adapter)
        conversation = Conversation(model, system=system, max_new_tokens=max_new_tokens)
        show = output is OutputFormat.TEXT
        if not messages:
            _interact(conversation, show=show, terminal=sys.stdin.isatty())
        elif show:
            for message in messages:
                _show_answer(conversation, message)
        else:
            print_json([conversation.ask(message) for message in messages])
    except JobError as error:
        raise fail(f"{error.reason}: {error.message}", exit_code=error.exit_code) from error


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, model: ChatModel, *, system: str | None, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self._model = model
        self._messages: list[dict[str, str]] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})

    def ask(self, message: str, on_text: Callable[[str], None] | None = None) -> dict[str, str | int]:
        """Send one user message: `{"message", "answer", "prompt", "finish_reason", "tokens"}`."""
        self._messages.append({"role": "user", "content": message})
        answer = self._model.answer(self._messages, max_new_tokens=self.max_new_tokens, on_text=on_text)
        self._messages.append({"role": "assistant", "content": answer.text})
        return {
            "message": message,
            "answer": answer.text,
            "prompt": answer.prompt,
            "finish_reason": answer.finish_reason,
            "tokens": answer.tokens,
        }


def _show_answer(conversation: Conversation, message: str) -> None:
    answer = conversation.ask(message, on_text=_show_piece)
    typer.echo()
    if answer["finish_reason"] == "length":
        sentence = f"(cut off after {conversation.max_new_tokens} tokens: ask for more with --max-new-tokens)"
        typer.secho(sentence, fg=typer.colors.YELLOW, err=True)


def _show_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _interact(conversation: Conversation, *, show: bool, terminal: bool) -> None:
    """Answers each line of standard input; JSON answers are a line each."""
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                typer.echo()
            return
        if not line.strip():
            continue
        if show:
            _show_answer(conversation, line)
        else:
            print_json(conversation.ask(line))
