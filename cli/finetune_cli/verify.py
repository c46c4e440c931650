"""`finetune verify`: whether an adapter, here or behind a server, still answers as it was trained."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.output import SHARED_CPU, OutputFormat, OutputOption, fail, print_json
from finetune_cli.served import ApiKeyOption, ModelOption, ServerOption, bearer_token, check_together

if TYPE_CHECKING:
    from finetune_trainer.verify.report import Report

CANNOT_TELL = 2


def verify(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Adapter folder, a finished job's folder, s3:// or a Hub name.")
    ],
    server: ServerOption = None,
    model: ModelOption = None,
    api_key_env: ApiKeyOption = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Without --server: base model instead of the adapter's own.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Without --server: let the base model run code of its own.")
    ] = False,
    output: OutputOption = OutputFormat.TEXT,
) -> None:
    """Ask the golden prompts again, of a server or of this machine, and say in one line whether all is as trained.

    Exit code 0: as trained; 1: not as trained; 2: it could not be told.
    """
    for name, value in {**SHARED_CPU, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    check_together(server, model, api_key_env)
    if server is not None and base_model is not None:
        raise fail("--base-model is for a verification on this machine: leave --server out.", exit_code=CANNOT_TELL)
    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as scratch:
        if server is not None and model is not None:
            report = _of_server(adapter, Path(scratch), server, model, api_key_env)
        else:
            report = _of_this_machine(adapter, Path(scratch), base_model, trust_remote_code=trust_remote_code)
    _show(report, output)
    raise typer.Exit(report.exit_code)


def _of_server(adapter: str, scratch: Path, url: str, model: str, api_key_env: str | None) -> Report:
    from finetune_trainer.errors import JobError
    from finetune_trainer.published.folder import open_adapter
    from finetune_trainer.verify.http import Server, ServerError
    from finetune_trainer.verify.server import verify_server

    try:
        with Server(url, token=bearer_token(api_key_env)) as server:
            return verify_server(open_adapter(adapter, scratch, weights=False), server, model)
    except ServerError as error:
        raise fail(str(error), exit_code=CANNOT_TELL) from error
    except JobError as error:
        raise fail(f"{error.reason}: {error.message}", exit_code=CANNOT_TELL) from error


def _of_this_machine(adapter: str, scratch: Path, base_model: str | None, *, trust_remote_code: bool) -> Report:
    from finetune_trainer.errors import JobError
    from finetune_trainer.published.base import Base
    from finetune_trainer.published.folder import open_adapter
    from finetune_trainer.quiet import quiet_libraries
    from finetune_trainer.verify.local import verify_locally

    base = Base(base_model) if base_model is not None else None
    try:
        folder = open_adapter(adapter, scratch, weights=True)
        with quiet_libraries():
            return verify_locally(folder, base=base, trust_remote_code=trust_remote_code)
    except JobError as error:
        raise fail(f"{error.reason}: {error.message}", exit_code=CANNOT_TELL) from error


def _show(report: Report, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(report.to_json())
        return
    colours = {True: typer.colors.GREEN, False: typer.colors.RED, None: typer.colors.YELLOW}
    typer.secho(report.message, fg=colours[report.verified])
    for note in report.notes:
        typer.secho(f"note: {note}", fg=typer.colors.YELLOW, err=True)
