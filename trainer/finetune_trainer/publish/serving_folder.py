"""Reads `ServingFacts` from an adapter's folder, without the libraries that load models.

The folder may come from anywhere: every file is bounded, and one that is not what it should be is a sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import orjson
import yaml

from finetune_api.generation import GenerationConfig
from finetune_api.outcome import Reason
from finetune_api.prompt_format import PromptFormat
from finetune_api.training import Quantization
from finetune_trainer.errors import JobError
from finetune_trainer.publish.serving_facts import ServingFacts
from finetune_trainer.published.job_beside import job_beside

CONFIG = "adapter_config.json"

_NO_NAME = "adapter"
_SMALL_BYTES = 8 << 20
_TOKENIZER_BYTES = 128 << 20
_HEADER_BYTES = 64 << 20
_NAME_CHARACTERS = 256
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_QUANTIZATION = re.compile("|".join(get_args(Quantization)))
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


def adapter_folder(name: str) -> Path:
    """The adapter's folder that `name` stands for: itself, or the folder `adapter` in it, as jobs leave it.

    Raises:
        JobError: ModelNotFound, there is none on this machine.
    """
    if "://" in name:
        raise JobError(Reason.MODEL_NOT_FOUND, f"{name} is no folder: copy the adapter to this machine first.")
    folder = Path(name).expanduser()
    if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file():
        folder = folder / "adapter"
    if not (folder / CONFIG).is_file():
        what = f"There is no {CONFIG} in {name}" if folder.is_dir() else f"There is no folder {name}"
        raise JobError(Reason.MODEL_NOT_FOUND, f"{what}: name the folder `adapter` of a finished job.")
    return folder


def weights_here(folder: Path) -> str | None:
    """The base model's folder on this machine, as the job that `finetune run` left beside `folder` names it."""
    job = job_beside(folder)
    if job is None:
        return None
    address = job.spec.initial_base_model_ckpt_path or job.spec.model_id
    if not isinstance(address, str) or "://" in address:
        return None
    path = Path(address).expanduser()
    return str(path.absolute()) if path.is_dir() else None


def read_facts(
    folder: Path,
    *,
    name: str | None = None,
    base: str | None = None,
    context_length: int | None = None,
    quantization: str | None = None,
    left_out: Sequence[str] = (),
) -> ServingFacts:
    """The facts of the adapter in `folder`.

    Args:
        folder: with adapter_config.json.
        name: instead of the job's in the manifest.
        base: base model instead of the adapter's own, e.g. a path.
        context_length: instead of the manifest's, before there is one.
        quantization: likewise.
        left_out: likewise.

    Raises:
        JobError: InvalidSpec, a file is not what it should be.
    """
    config = _json(folder / CONFIG)
    manifest = _json(folder / "manifest.json", needed=False)
    generation = _json(folder / "generation_config.json", needed=False)
    tokenizer = _json(folder / "tokenizer.json", needed=False, limit=_TOKENIZER_BYTES)
    declared = _declared(folder / "prompt_format.yaml")
    tokens = _added_tokens(tokenizer)
    ids = tuple(dict.fromkeys([*_listed(generation.get("eos_token_id"), int), *declared.stopping_tokens]))
    known = {token["content"] for token in tokens}
    texts = [*_listed(generation.get("stop_strings"), str), *declared.stopping_sequences]
    found = declared.prompt_format
    trained = manifest.get("contextLength")
    own = _matching(config.get("base_model_name_or_path"), _HUB_NAME)
    return ServingFacts(
        name=name or _name(manifest),
        base=base or own,
        # A commit of another model means nothing to this one.
        revision=_matching(config.get("revision"), _REVISION) if base in (None, own) else None,
        rank=_rank(config, folder),
        stop_ids=ids,
        stop_texts=tuple(text for text in dict.fromkeys(texts) if text and text not in known),
        texts_of_ids=tuple(token["content"] for token in tokens if token["id"] in ids),
        special=frozenset(token["content"] for token in tokens if token.get("special")),
        bos=_automatic_bos(tokenizer),
        prompt_format=found if isinstance(found, PromptFormat) else None,
        context_length=context_length or (trained if isinstance(trained, int) and trained > 0 else None),
        quantization=quantization or _matching(manifest.get("quantization"), _QUANTIZATION),
        left_out=tuple(left_out or _listed(manifest.get("quantizationLeftOut"), str)),
        tensors=_tensor_names(folder / "adapter_model.safetensors"),
    )


def _rank(config: dict[str, Any], folder: Path) -> int:
    pattern = config.get("rank_pattern")
    values = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    ranks = [value for value in values if isinstance(value, int) and value > 0]
    if len(ranks) < len(values):
        raise JobError(
            Reason.INVALID_SPEC, f"{folder / CONFIG} is no LoRA adapter's (r: {values[0]!r}): copy the adapter again."
        )
    return max(ranks)


def _name(manifest: dict[str, Any]) -> str:
    name = manifest.get("job")
    return name[:_NAME_CHARACTERS] if isinstance(name, str) and name else _NO_NAME


def _matching(value: Any, pattern: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def _listed(value: Any, kind: type) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, kind) and not isinstance(each, bool)]


def _declared(path: Path) -> GenerationConfig:
    data = _bytes(path, _SMALL_BYTES)
    if data is None:
        return GenerationConfig()
    try:
        declared = GenerationConfig.model_validate(yaml.safe_load(data.decode()))
        # YAML can name half of a surrogate pair, which is no text.
        declared.model_dump_json()
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _unreadable(path) from error
    return declared


def _added_tokens(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        token
        for token in _listed(tokenizer.get("added_tokens"), dict)
        if isinstance(token.get("content"), str) and token["content"].strip() and isinstance(token.get("id"), int)
    ]


def _automatic_bos(tokenizer: dict[str, Any]) -> str | None:
    """The special token that the tokenizer's post-processor puts before a text."""
    processor = tokenizer.get("post_processor")
    steps = [processor, *_listed(processor.get("processors"), dict)] if isinstance(processor, dict) else []
    for step in steps:
        if step.get("type") == "TemplateProcessing" and isinstance(step.get("single"), list) and step["single"]:
            first = step["single"][0]
            token = first.get("SpecialToken") if isinstance(first, dict) else None
            text = token.get("id") if isinstance(token, dict) else None
        elif step.get("type") in ("RobertaProcessing", "BertProcessing") and isinstance(step.get("cls"), list):
            text = step["cls"][0] if step["cls"] else None
        else:
            continue
        if isinstance(text, str) and text:
            return text
    return None


def _tensor_names(path: Path) -> tuple[str, ...]:
    """From the head of the file alone."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            # Cut off, it is no JSON.
            head = json.loads(file.read(min(size, _HEADER_BYTES)))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path) from error
    return tuple(name for name in head if name != "__metadata__") if isinstance(head, dict) else ()


def _json(path: Path, *, needed: bool = True, limit: int = _SMALL_BYTES) -> dict[str, Any]:
    data = _bytes(path, limit)
    if data is None:
        if needed:
            raise _unreadable(path)
        return {}
    try:
        content = orjson.loads(data)
    except ValueError as error:
        raise _unreadable(path) from error
    if not isinstance(content, dict):
        raise _unreadable(path)
    return content


def _bytes(path: Path, limit: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path) from error
    if len(data) > limit:
        raise _unreadable(path)
    return data


def _unreadable(path: Path) -> JobError:
    return JobError(Reason.INVALID_SPEC, f"{path} cannot be read: copy the adapter again.")
