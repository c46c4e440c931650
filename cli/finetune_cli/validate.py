"""`finetune validate`: what is wrong with job files, before anything is downloaded or applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli.output import INVALID_JOB_EXIT_CODE, OutputFormat, OutputOption, print_json

if TYPE_CHECKING:
    from finetune_api.load import LoadResult
    from finetune_api.problem import Problem


def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="FineTuneJob or LLMForge files.")],
    output: OutputOption = OutputFormat.TEXT,
) -> None:
    """Check job files. Exit code 0 when all are valid, 1 otherwise.

    Nothing is downloaded: a tokenizer's chat template is looked at only where it lies on this machine.
    """
    from finetune_api.load import load_job_file

    results = [(file, load_job_file(file)) for file in files]
    told = [(file, result.errors, [*result.warnings, *_template_warnings(result)]) for file, result in results]
    if output is OutputFormat.JSON:
        print_json([verdict(*each) for each in told])
    else:
        for each in told:
            _show(*each)
    if any(result.errors for _, result in results):
        raise typer.Exit(INVALID_JOB_EXIT_CODE)


def verdict(file: str, errors: Sequence[Problem], warnings: Sequence[Problem]) -> dict[str, Any]:
    """One file's result: `{"file", "valid", "errors": [{"path", "message"}], "warnings": [...]}`."""
    return {
        "file": file,
        "valid": not errors,
        "errors": [{"path": problem.path, "message": problem.message} for problem in errors],
        "warnings": [{"path": problem.path, "message": problem.message} for problem in warnings],
    }


def _template_warnings(result: LoadResult) -> list[Problem]:
    """What is known of a chat template without a download. Only a job that takes one waits for transformers."""
    from finetune_api.problem import Problem
    from finetune_api.prompt_format import HuggingFaceChatTemplate

    generation = result.job.spec.generation_config if result.job else None
    if result.job is None or generation is None or not isinstance(generation.prompt_format, HuggingFaceChatTemplate):
        return []
    try:
        from finetune_trainer.tokenizer_at_hand import template_warnings
    except ModuleNotFoundError:  # The command line is installed without the trainer.
        return []
    path = "spec.generation_config.prompt_format"
    return [result.as_written(Problem(path, sentence)) for sentence in template_warnings(result.job.spec)]


def _show(file: str, errors: Sequence[Problem], warnings: Sequence[Problem]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text.assemble((file, "bold"), ": ", ("invalid", "bold red") if errors else ("valid", "bold green")))
    for kind, style, problems in (("error", "red", errors), ("warning", "yellow", warnings)):
        for problem in problems:
            where = (f"{problem.path}: ", "bold") if problem.path else ""
            console.print(Text.assemble("  ", (f"{kind}: ", style), where, problem.message))
