"""README.md of an adapter: what the Hub, and whoever opens the folder, is to know first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finetune_trainer.pins import BaseModelName
from finetune_trainer.publish.markdown import code, one_line
from finetune_trainer.publish.report import ReportData

NAME = "README.md"
_LICENCE_KEYS = ("license", "license_name", "license_link")
_MOST_BYTES = 256 * 1024
"""Of a base model's card; its metadata come first."""


def read_licence(model: Any) -> dict[str, str]:
    """What the card of the base model that was loaded declares as its licence, in the Hub's keys; often nothing.

    Args:
        model: transformers' model; its folder has the card where the model came with one.
    """
    try:
        with Path(model.config._name_or_path, NAME).open("rb") as stream:  # noqa: SLF001  # It has no other name.
            _, head, _ = stream.read(_MOST_BYTES).decode(errors="replace").split("---\n", 2)
        metadata = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = metadata if isinstance(metadata, dict) else {}
    return {key: found[key] for key in _LICENCE_KEYS if isinstance(found.get(key), str)}


def write_model_card(
    folder: Path,
    report: ReportData,
    *,
    base: BaseModelName,
    licence: Mapping[str, str],
    sha256: str,
    quantization: str | None = None,
) -> None:
    """Write the card into the adapter's `folder`.

    Args:
        folder: the adapter's.
        report: what was trained on what, and how well it went.
        base: the base model. The Hub takes names of its own only, so others stay out of the card's metadata.
        licence: the base model's, in the Hub's keys.
        sha256: digest of the training file.
        quantization: of the base model while it was trained on, if any.
    """
    metadata: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    if base.hub_name:
        relation = {"base_model": base.hub_name, "base_model_relation": "adapter"}
        metadata = {**relation, **licence, **metadata}
    revision = f" at revision {code(base.revision)}" if base.revision else ""
    trained_in = f", trained on it in {code(quantization)} (bitsandbytes)" if quantization else ""
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
        f"# {one_line(report.job_name)}",
        "",
        f"A LoRA adapter of {code(base.name)}{revision}{trained_in}.",
        "",
        "## Trained layers",
        "",
        f"{one_line(report.targets or '')}.",
        "",
        *(f"- {code(layer)}" for layer in report.layers),
        "",
        "## Data and figures",
        "",
        *(f"- {data.name} rows: {data.rows:,}" for data in report.data if data.rows is not None),
        f"- sha256 of the training file: `{sha256}`",
        *(f"- {name}: {value:.4g}" for name, value in figures.items() if value is not None),
        "",
        "## Use",
        "",
        "[SERVING.md](SERVING.md) has the commands for vLLM, Transformers and other servers. Prompts are rendered by",
        "`chat_template.jinja`; `prompt_format.yaml` declares the same text; `generation_config.json` has the tokens",
        "that end an answer. `finetune verify` holds a server against what the model answered after training.",
        "`report.html` shows the data, the curves and the whole job.",
    ]
    (folder / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
