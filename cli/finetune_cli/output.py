"""How commands answer: text for people, JSON for programs, and one sentence on standard error for failures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from finetune_api.problem import Problem

INVALID_JOB_EXIT_CODE = 1


SHARED_CPU = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Set before torch is loaded, unless the user has: threads that wait by spinning make everything several times slower
on a machine that does anything else besides, as a laptop does."""


class OutputFormat(StrEnum):
    """What `-o` takes."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[OutputFormat, typer.Option("--output", "-o", help="Text for people or JSON for programs.")]

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the job, e.g. --set num_epochs=2. Repeatable."),
]


def print_json(value: Any) -> None:
    """`value` as one line of JSON on standard output."""
    import orjson

    sys.stdout.write(orjson.dumps(value).decode() + "\n")


def fail(sentence: str, *, exit_code: int) -> typer.Exit:
    """Prints the sentence; the result is to be raised."""
    typer.secho(sentence, fg=typer.colors.RED, err=True)
    return typer.Exit(exit_code)


def problems_failed(file: str, problems: Sequence[Problem]) -> typer.Exit:
    """Prints what is wrong with a job; the result is to be raised."""
    # A sentence about the file as a whole names it.
    lines = (f"{file}: {problem}" if problem.path else problem.message for problem in problems)
    return fail("\n".join(lines), exit_code=INVALID_JOB_EXIT_CODE)


def warn(file: str, problems: Sequence[Problem]) -> None:
    """Prints what the job's author should know."""
    for problem in problems:
        typer.secho(f"{file}: warning: {problem}", fg=typer.colors.YELLOW, err=True)
