"""`finetune merge`: a whole model from an adapter, for servers and formats that know no adapters."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli.output import SHARED_CPU, OutputFormat, fail, print_json

if TYPE_CHECKING:
    from finetune_trainer.merge.merge import Merged


class Precision(StrEnum):
    """What `--dtype` takes."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def merge(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="Adapter folder, its job's output folder, s3://, pvc:// or hf://owner/name."
        ),
    ],
    target: Annotated[
        Path, typer.Option("--output", "--output-dir", metavar="DIR", help="Folder for the model; it must not exist.")
    ],
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Base model: folder, s3:// or Hub id. Default: the adapter's.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option("--dtype", help="Precision of the result. Default: the base model's.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the base model brings.")
    ] = False,
    output: Annotated[
        OutputFormat, typer.Option("--format", "-o", help="Text for people or JSON for programs.")
    ] = OutputFormat.TEXT,
) -> None:
    """Merge an adapter into its base model, and compare the result with both before it is kept."""
    for name, value in {**SHARED_CPU, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    import torch

    from finetune_trainer.errors import JobError
    from finetune_trainer.merge.merge import merge as merge_adapter

    text = output is OutputFormat.TEXT
    try:
        merged = merge_adapter(
            adapter,
            target,
            base_model=base_model,
            dtype=getattr(torch, dtype.value) if dtype else None,
            trust_remote_code=trust_remote_code,
            say=typer.echo if text else lambda _: None,
        )
    except JobError as error:
        raise fail(f"{error.reason}: {error.message}", exit_code=error.exit_code) from error
    for notice in merged.notices:
        typer.secho(f"warning: {notice}", fg=typer.colors.YELLOW, err=True)
    if text:
        typer.echo(f"{merged.sentence()} {merged.dtype}: {merged.folder}")
    else:
        print_json(_described(merged))


def _described(merged: Merged) -> dict[str, Any]:
    """`{"folder", "baseModel", "dtype", "sizeBytes", "sha256", "compared": {...}, "notices": [...]}`."""
    return {
        "folder": str(merged.folder),
        "baseModel": merged.base_model,
        "dtype": merged.dtype,
        "sizeBytes": merged.size_bytes,
        "sha256": merged.sha256,
        "compared": merged.compared(),
        "notices": list(merged.notices),
    }
