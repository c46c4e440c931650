"""`finetune preview`: the first rows exactly as the model will see them, and which part it learns to produce."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.output import OutputFormat, OutputOption, SetOption, fail, print_json, problems_failed, warn

if TYPE_CHECKING:
    from rich.text import Text

    from finetune_trainer.data.preview import PreviewRow

JSON_KEYS = ("row", "text", "input_ids", "loss_mask", "inference_prompt", "inference_ids")


def preview(
    file: Annotated[str, typer.Argument(metavar="FILE", help="FineTuneJob or LLMForge file.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows to show.")] = 3,
    settings: SetOption = None,
    output: OutputOption = OutputFormat.TEXT,
) -> None:
    """Show the first rows as the model sees them, the trained part in colour.

    Needs the data and the model's tokenizer, never its weights.
    """
    from finetune_api.defaults import effective_job
    from finetune_api.load import load_job_file

    result = load_job_file(file, settings or [])
    if result.job is None:
        raise problems_failed(file, result.errors)
    warn(file, result.warnings)
    # Progress bars of libraries have no place beside an answer that programs read.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from finetune_trainer.data.preview import preview_rows
    from finetune_trainer.errors import JobError

    try:
        found, warnings = preview_rows(effective_job(result.job), rows)
    except JobError as error:
        raise fail(f"{error.reason}: {error.message}", exit_code=error.exit_code) from error
    for warning in warnings:
        typer.secho(f"{file}: warning: {warning}", fg=typer.colors.YELLOW, err=True)
    if output is OutputFormat.JSON:
        print_json([{key: getattr(row, key) for key in JSON_KEYS} for row in found])
    else:
        _show(found)


def _show(rows: Sequence[PreviewRow]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    coloured = console.color_system is not None
    legend = Text.assemble("The model learns to produce ", *_trained("what looks like this", coloured), ".")
    console.print(legend, style="dim")
    for row in rows:
        console.print()
        console.print(heading(row), style="bold")
        for note in row.notes:
            console.print(Text(f"note: {note}", "yellow"))
        console.print(rendered(row.spans, coloured=coloured))


def heading(row: PreviewRow) -> str:
    """The row's figures in one line."""
    return f"line {row.row}: {len(row.input_ids)} tokens, {sum(row.loss_mask)} of them trained"


def rendered(spans: Sequence[tuple[str, bool]], *, coloured: bool) -> Text:
    """The row's text; without colours the trained parts stand between ⟦ and ⟧."""
    from rich.text import Text

    parts: list[str | tuple[str, str]] = []
    for text, trained in spans:
        parts.extend(_trained(text, coloured) if trained else [text])
    return Text.assemble(*parts)


def _trained(text: str, coloured: bool) -> list[str | tuple[str, str]]:
    return [(text, "bold black on green")] if coloured else [f"⟦{text}⟧"]
