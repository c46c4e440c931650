"""Options of commands that ask a server, and the bearer token that it wants."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from finetune_cli.output import fail

USAGE = 2

ServerOption = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="An OpenAI-compatible server, e.g. http://host:8000.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The name under which it serves the adapter.")
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option("--api-key-env", metavar="VAR", help="Environment variable with the server's bearer token."),
]


def check_together(server: str | None, model: str | None, api_key_env: str | None) -> None:
    """End the command where one of the options lacks another."""
    if (server is None) != (model is None):
        raise fail("--server and --model go together: name both, or neither.", exit_code=USAGE)
    if server is None and api_key_env is not None:
        raise fail("--api-key-env is for a server: name it with --server.", exit_code=USAGE)


def bearer_token(api_key_env: str | None) -> str | None:
    """What the variable holds; ends the command where it is named and not set."""
    if api_key_env is None:
        return None
    token = os.environ.get(api_key_env)
    if not token:
        raise fail(f"The variable {api_key_env} is not set: put the server's token into it.", exit_code=USAGE)
    return token
