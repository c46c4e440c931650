"""A merged model's folder: what plain transformers, vLLM and llama.cpp's converter load without PEFT.

config.json, model*.safetensors                 the weights, in the precision that the base model is published in
tokenizer files, chat_template.jinja            the adapter's: they render the trained prompt
generation_config.json                          the adapter's: the ids that end an answer
prompt_format.yaml                              the declared format and stops
README.md                                       what was merged into what, and how it was compared
manifest.json                                   digests, written last
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune_trainer.merge.opened import BaseModel
from finetune_trainer.published.folder import CONFIG, HUB_NAME
from finetune_trainer.storage import MANIFEST_NAME
from finetune_trainer.storage.model_files import INDEX, tokenizer_files

PROMPT_FORMAT = "prompt_format.yaml"
GENERATION = "generation_config.json"
README = "README.md"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_NOT_THE_TOKENIZERS = {"config.json", CONFIG, GENERATION, MANIFEST_NAME, *_PROCESSORS}
_SHARD = "5GB"
_CARD_LIMIT_BYTES = 1_000_000


def round_weights(model: Any, base: BaseModel, dtype: torch.dtype) -> bool:
    """Round every weight to what it will be stored in, and keep it in the precision that is computed in.

    Returns:
        Whether that changed one.
    """
    changed = False
    for name, weight in model.state_dict().items():
        if weight.is_floating_point():
            rounded = weight.to(base.exceptions.get(name, dtype)).to(weight.dtype)
            changed = changed or not torch.equal(rounded, weight)
            weight.copy_(rounded)
    return changed


def write_weights(model: Any, folder: Path, base: BaseModel, dtype: torch.dtype) -> None:
    """Write configuration and weights. `model` holds no weights afterwards: they make room for what comes next."""
    from transformers import GenerationConfig

    held = [*model.named_parameters(), *model.named_buffers()]
    kept = set(model.state_dict(keep_vars=True))
    for name, weight in held:
        if weight.is_floating_point() and name in kept:
            weight.data = weight.data.to(base.exceptions.get(name, dtype))
    # The base's own defaults may be what transformers refuses to save; the folder gets the adapter's.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size=_SHARD)
    (folder / GENERATION).unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        # safetensors writes for this user alone; a server is often another one.
        file.chmod(0o644)
    path = folder / "config.json"
    content = _with_dtype(json.loads(path.read_text(encoding="utf-8")), str(dtype).removeprefix("torch."))
    content.pop("quantization_config", None)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    for _, weight in held:
        weight.data = torch.empty(0, dtype=weight.dtype)


def copy_small_files(folder: Path, adapter: Path, base: Path, *, whole: bool) -> None:
    """Put in what comes from the adapter, and from the base where the adapter brings none.

    Args:
        folder: the merged model's.
        adapter: the adapter's.
        base: the base model's.
        whole: the merged model is of the base's own kind, so that its processors for images and sound apply.
    """
    source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    names = [name for name in tokenizer_files(files) if name not in _NOT_THE_TOKENIZERS and not INDEX.fullmatch(name)]
    for name in names:
        _copy(source, name, folder)
    _copy(adapter if (adapter / GENERATION).is_file() else base, GENERATION, folder)
    _copy(adapter, PROMPT_FORMAT, folder)
    for name in _PROCESSORS if whole else ():
        _copy(base, name, folder)


def public_name(base_name: str) -> str:
    """A base model's name for others: of a path on this machine the last part."""
    path = Path(base_name).expanduser()
    return path.name if path.is_absolute() or path.exists() else base_name


def write_card(
    folder: Path, adapter: Path, base_name: str, revision: str | None, dtype: torch.dtype, sentence: str
) -> None:
    """README.md with the Hub's front matter; the licence is what the adapter's card says.

    Args:
        folder: the merged model's.
        adapter: the folder of what was merged.
        base_name: into what.
        revision: its commit on the Hub.
        dtype: of the result.
        sentence: how it was compared.
    """
    told, title = _card(adapter / README)
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    named = public_name(base_name)
    if HUB_NAME.fullmatch(named):
        metadata = {"base_model": named, "base_model_relation": "finetune", **metadata}
    elif isinstance(told.get("base_model"), str):
        metadata = {"base_model": told["base_model"], "base_model_relation": "finetune", **metadata}
    metadata |= {
        key: told[key] for key in ("license", "license_name", "license_link") if isinstance(told.get(key), str)
    }
    named = metadata.get("base_model") or named
    at_revision = f" at revision `{revision}`" if revision else ""
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {title or 'Merged model'}",
        "",
        f"`{named}`{at_revision} with a LoRA adapter merged into its weights, in {str(dtype).removeprefix('torch.')}.",
        sentence,
        "",
        "## Use",
        "",
        "A whole model: servers need no adapter option, and take its chat template and its stops from the folder.",
        "",
        "```",
        "vllm serve THIS_FOLDER",
        "```",
        "",
        "Prompts are rendered by `chat_template.jinja`; `generation_config.json` has the tokens that end an answer.",
    ]
    (folder / README).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _card(file: Path) -> tuple[Mapping[str, Any], str]:
    """Front matter and title of an adapter's card; nothing where it is not what it should be."""
    try:
        if file.stat().st_size > _CARD_LIMIT_BYTES:
            return {}, ""
        text = file.read_text(encoding="utf-8")
        found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        metadata = yaml.safe_load(found.group(1)) if found else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}, ""
    title = re.search(r"^# (.{1,200})$", text, re.MULTILINE)
    return metadata if isinstance(metadata, dict) else {}, title.group(1).strip() if title else ""


def _copy(source: Path, name: str, folder: Path) -> None:
    if (source / name).is_file():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _with_dtype(content: Any, name: str) -> Any:
    """A configuration with one precision throughout: its parts name one too."""
    if isinstance(content, dict):
        return {
            key: name if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, name)
            for key, value in content.items()
        }
    return content
