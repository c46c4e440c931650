"""README.md of an adapter: what the Hub, and whoever opens the folder, is to know first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from finetune_trainer.publish.report import ReportData

NAME = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(folder: Path, report: ReportData, *, base_model: str) -> None:
    """Write the card into the adapter's `folder`.

    Args:
        folder: the adapter's.
        report: what was trained on what, and how well it went.
        base_model: where the base model is loaded from. The Hub takes names of its own only, so others stay out of the
            card's metadata.
    """
    metadata: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    if _HUB_NAME.fullmatch(base_model):
        metadata = {"base_model": base_model, **metadata}
    revision = f" at revision `{report.model_revision}`" if report.model_revision else ""
    figures = {
        "training loss": report.train_loss,
        "validation loss": report.eval_loss,
        "perplexity": report.perplexity,
        "token accuracy": report.token_accuracy,
    }
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {report.job_name}",
        "",
        f"A LoRA adapter of `{base_model}`{revision}.",
        "",
        "## Trained layers",
        "",
        f"{report.targets}.",
        "",
        *(f"- `{layer}`" for layer in report.layers),
        "",
        "## Figures",
        "",
        *(f"- {name}: {value:.4g}" for name, value in figures.items() if value is not None),
        *(f"- {data.name} rows: {data.rows:,}" for data in report.data if data.rows is not None),
        "",
        "## Use",
        "",
        "Prompts are rendered by `chat_template.jinja`; `prompt_format.yaml` declares the same text, and",
        "`generation_config.json` has the tokens that end an answer. `report.html` shows the data, the curves and the",
        "whole job.",
    ]
    (folder / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
