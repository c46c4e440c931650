"""`finetune chat`: asks a fine-tuned model, prompted with exactly the text it was trained on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.output import SHARED_CPU, OutputFormat, OutputOption, fail, print_json
from finetune_cli.served import USAGE, ApiKeyOption, ModelOption, ServerOption, bearer_token, check_together

UNREACHABLE = 1

if TYPE_CHECKING:
    from finetune_trainer.conversation import Answerer, Conversation


def chat(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Adapter folder, a finished job's or a whole model's, or s3://.")
    ],
    messages: Annotated[
        list[str] | None, typer.Option("--message", "-m", help="What to ask; one conversation. Repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Base model: folder, s3:// or Hub id. Default: the adapter's.")
    ] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Answer with the base model alone.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base model run code of its own.")
    ] = False,
    server: ServerOption = None,
    model: ModelOption = None,
    api_key_env: ApiKeyOption = None,
    output: OutputOption = OutputFormat.TEXT,
) -> None:
    """Talk to a fine-tuned model: with --message once, otherwise until end of input (Ctrl-D)."""
    for name, value in {**SHARED_CPU, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    from finetune_trainer.conversation import Conversation
    from finetune_trainer.errors import JobError

    check_together(server, model, api_key_env)
    if server is not None and (base_model is not None or no_adapter or trust_remote_code):
        raise fail(
            "--base-model, --no-adapter and --trust-remote-code are for a model on this machine: leave --server out.",
            exit_code=USAGE,
        )
    try:
        with _answerer(
            adapter, base_model, server, model, api_key_env, adapted=not no_adapter, trusted=trust_remote_code
        ) as answerer:
            conversation = Conversation(answerer, system=system, max_new_tokens=max_new_tokens)
            show = output is OutputFormat.TEXT
            if not messages:
                _interact(conversation, show=show, terminal=sys.stdin.isatty())
            elif show:
                _show_all(conversation, messages)
            else:
                print_json([conversation.ask(message) for message in messages])
    except JobError as error:
        raise fail(f"{error.reason}: {error.message}", exit_code=error.exit_code) from error


@contextmanager
def _answerer(
    adapter: str,
    base_model: str | None,
    url: str | None,
    name: str | None,
    api_key_env: str | None,
    *,
    adapted: bool,
    trusted: bool,
) -> Iterator[Answerer]:
    if url is not None and name is not None:
        from finetune_trainer.conversation import Served
        from finetune_trainer.verify.http import Server, ServerError

        try:
            with Server(url, token=bearer_token(api_key_env)) as server:
                yield Served.of(adapter, server, name)
        except ServerError as error:
            raise fail(str(error), exit_code=UNREACHABLE) from error
        return
    from finetune_trainer.chat import ChatModel

    model = ChatModel.load(adapter, base_model=base_model, with_adapter=adapted, trust_remote_code=trusted)
    for notice in model.notices:
        typer.secho(notice, fg=typer.colors.YELLOW, err=True)
    yield model


def _show_all(conversation: Conversation, messages: list[str]) -> None:
    """One question's answer alone; of several the conversation that they are."""
    for number, message in enumerate(messages):
        if len(messages) > 1:
            typer.echo(f"{'' if number == 0 else chr(10)}user: {message}\nassistant: ", nl=False)
        _show_answer(conversation, message)


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
