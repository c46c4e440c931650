"""`finetune run`: one attempt of a job on this machine, by the launcher that runs in a cluster's pods."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.output import SetOption, problems_failed, warn

if TYPE_CHECKING:
    from finetune_api.job import FineTuneJob
    from finetune_api.outcome import TerminationMessage

OUTPUT_ROOT = "finetune-output"
"""Folder in the working directory that holds a folder per job, unless the job or --output-dir names another place."""


def run(
    file: Annotated[str, typer.Argument(metavar="FILE", help="FineTuneJob or LLMForge file.")],
    output_dir: Annotated[
        str | None,
        typer.Option(
            "--output-dir",
            metavar="DIR",
            help=f"Where adapter, checkpoints and report go. Default: the job's output, else ./{OUTPUT_ROOT}/<name>.",
        ),
    ] = None,
    settings: SetOption = None,
) -> None:
    """Fine-tune on this machine. Started again on the same output, it goes on from the last checkpoint.

    Exit codes: 0 done; 1-127 the job has to be changed; 128 and above: start it again.
    """
    from finetune_api.job_file import job_yaml
    from finetune_api.load import load_job, load_job_file
    from finetune_cli.local_attempt import run_attempt

    result = load_job_file(file, settings or [])
    if result.job is None:
        raise problems_failed(file, result.errors)
    job = placed(result.job, output_dir)
    text = job_yaml(job)
    # What the trainer will say again when it reads the effective job is left to it.
    repeated = {problem.message for problem in load_job(text, source=file).warnings}
    warn(file, [problem for problem in result.warnings if problem.message not in repeated])
    exit_code, message = run_attempt(text)
    if message is not None and message.succeeded:
        _keep(job, text)
        _show_result(job, message)
    elif message is None:
        typer.secho(
            f"The trainer ended without a word (exit code {exit_code}), as after `kill -9` or when memory ran out: "
            "run the same command to go on from the last checkpoint.",
            fg=typer.colors.RED,
            err=True,
        )
    raise typer.Exit(exit_code)


def placed(job: FineTuneJob, output_dir: str | None) -> FineTuneJob:
    """The effective job with a place for its results."""
    from finetune_api.defaults import effective_job
    from finetune_api.workers import Output

    effective = effective_job(job)
    # The uid of a manifest that came from a cluster would make the output a folder below the one that was asked for.
    effective = effective.model_copy(update={"metadata": effective.metadata.model_copy(update={"uid": None})})
    if output_dir is None and effective.spec.output is not None:
        return effective
    uri = output_dir or f"{OUTPUT_ROOT}/{job.metadata.name}"
    if "://" not in uri:
        uri = str(Path(uri).expanduser().absolute())
    output = effective.spec.output.model_copy(update={"uri": uri}) if effective.spec.output else Output(uri=uri)
    spec = effective.spec.model_copy(update={"output": output})
    return effective.model_copy(update={"spec": spec})


def _keep(job: FineTuneJob, text: str) -> None:
    """Puts the effective job beside the results when those are on this machine."""
    from finetune_api.output import output_address

    address = output_address(job)
    if address is not None and "://" not in address:
        Path(address, "job.yaml").write_text(text, encoding="utf-8")


def _show_result(job: FineTuneJob, message: TerminationMessage) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for label, value in result_lines(job, message):
        console.print(Text.assemble((f"{label:<9}", "bold green"), value))


def result_lines(job: FineTuneJob, message: TerminationMessage) -> list[tuple[str, str]]:
    """What to say after success: (label, value) per line."""
    if message.adapter is None:
        return []
    adapter = _shortest(message.adapter.uri.removeprefix("file://"))
    lines = [("Adapter", adapter), ("Report", f"{adapter.rstrip('/').removesuffix('/adapter')}/report.html")]
    if "://" not in adapter:
        command = ["finetune", "chat", adapter]
        weights = job.spec.initial_base_model_ckpt_path
        if isinstance(weights, str):
            command += ["--base-model", weights]
        lines.append(("Try it", shlex.join(command)))
    return lines


def _shortest(place: str) -> str:
    """A path below the working directory without it; anything else as it is."""
    path = Path(place)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else place
