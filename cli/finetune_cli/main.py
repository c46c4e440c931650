"""The command `finetune` and its commands.

What a command needs is imported when it runs, so that --help answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from finetune_cli.chat import chat
from finetune_cli.merge import merge
from finetune_cli.preview import preview
from finetune_cli.render import render
from finetune_cli.run import run
from finetune_cli.serve_notes import serve_notes
from finetune_cli.validate import validate
from finetune_cli.verify import verify

app = typer.Typer(
    name="finetune",
    help="Fine-tune a Hugging Face language model from one YAML.",
    no_args_is_help=True,
    # A stack trace of ours is for a bug report: complete, and without the values of local variables.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(validate)
app.command()(preview)
app.command()(render)
app.command()(chat)
app.command()(verify)
app.command()(merge)
app.command("serve-notes")(serve_notes)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"finetune {version('finetune-operator')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""
