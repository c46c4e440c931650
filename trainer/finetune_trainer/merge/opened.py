"""The two halves of a merge as they are found: an adapter's folder, and the base model that it names, in floats."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.model.load import load_config, load_model
from finetune_trainer.model.quantized import published_method
from finetune_trainer.published.folder import AdapterFolder, open_adapter
from finetune_trainer.storage import MANIFEST_NAME
from finetune_trainer.storage.manifest import parse_manifest, verify_tree

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DEQUANTIZED_WHEN_LOADED = ("fp8", "mxfp4")
_DEQUANTIZED_AFTERWARDS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


@dataclass(frozen=True)
class BaseModel:
    """A base model in memory."""

    model: Any
    config: Any
    """As its folder has it, before anything was changed."""
    precision: torch.dtype
    """Of most of its weights, as published; of what they were dequantized to."""
    exceptions: dict[str, torch.dtype]
    """Weights published in another one, by name."""
    notices: list[str]


@contextmanager
def adapter_at(name: str) -> Iterator[AdapterFolder]:
    """The adapter that `name` stands for: its folder, its job's output folder, or an s3://, pvc:// or hf:// address.

    Raises:
        JobError: ModelNotFound, there is none; InvalidSpec, it is of a kind that cannot be merged; StorageNotFound, it
            is damaged; or as fetching does.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-merge-") as scratch:
        adapter = open_adapter(name, Path(scratch), weights=True)
        if (manifest := adapter.path / MANIFEST_NAME).is_file():
            verify_tree(adapter.path, parse_manifest(manifest.read_bytes(), str(manifest)), name)
        _check_kind(adapter)
        yield adapter


def _check_kind(adapter: AdapterFolder) -> None:
    kind = adapter.config.get("peft_type")
    if kind != "LORA":
        raise JobError(
            Reason.INVALID_SPEC, f"{adapter.address} is no LoRA adapter (peft_type: {kind}): others are not merged."
        )
    if adapter.config.get("alora_invocation_tokens"):
        raise JobError(
            Reason.INVALID_SPEC,
            f"{adapter.address} acts only behind certain tokens (alora_invocation_tokens), which no merged weight can: "
            "serve it as an adapter.",
        )


def load_base(folder: Path, *, dtype: torch.dtype, name: str, trust_remote_code: bool) -> BaseModel:
    """The model in `folder` with plain weights in `dtype`; quantized ones are dequantized where transformers can.

    Raises:
        JobError: ModelUnsupported, it cannot be loaded or dequantized.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code, name=name)
    method = published_method(config)
    if method is None:
        notices: list[str] = []
        model = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code, name=name, notices=notices)
        model.config.use_cache = _use_cache(config)
        return BaseModel(model, config, *_published(folder, config), notices)
    model = _dequantized(folder, config, method, dtype=dtype, name=name, trust_remote_code=trust_remote_code)
    precision = _declared(config, torch.bfloat16)
    told = f"{name} is quantized ({method}): its weights were dequantized, and the merged model is not quantized."
    return BaseModel(model, config, precision, {}, [told])


def _dequantized(
    folder: Path, config: Any, method: str, *, dtype: torch.dtype, name: str, trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    if method not in (*_DEQUANTIZED_WHEN_LOADED, *_DEQUANTIZED_AFTERWARDS):
        raise _no_floats(name, f"is quantized ({method}), and transformers does not dequantize that")
    config = copy.deepcopy(config)
    if method in _DEQUANTIZED_WHEN_LOADED:
        config.quantization_config["dequantize"] = True
    try:
        model = auto.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if method in _DEQUANTIZED_AFTERWARDS:
            model = model.dequantize(dtype=dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # A package that is missing, or whatever a foreign folder makes of transformers.
        raise _no_floats(
            name, f"is quantized ({method}) and cannot be dequantized here ({first_line(error)})"
        ) from error
    # They are plain numbers by now; the markers would make save_pretrained refuse, or pack them again.
    model.hf_quantizer = None
    model._weight_conversions = None  # noqa: SLF001 - None stands for the model type's own.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.to(dtype).requires_grad_(False)


def _no_floats(name: str, what: str) -> JobError:
    return JobError(
        Reason.MODEL_UNSUPPORTED,
        f"{name} {what}: merge into the model that it was made from (--base-model), or serve the adapter as it is.",
    )


def _use_cache(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "use_cache", True))


def _declared(config: Any, otherwise: torch.dtype) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype in _FLOATS.values() else otherwise


def _published(folder: Path, config: Any) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """The precision of most values in a folder, and the weights that have another one."""
    stored: dict[str, torch.dtype] = {}
    counts: Counter[torch.dtype] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping.
                    part = opened.get_slice(key)
                    if (dtype := _FLOATS.get(part.get_dtype())) is not None:
                        stored[key] = dtype
                        counts[dtype] += torch.Size(part.get_shape()).numel()
        except (SafetensorError, OSError):
            # Not one of the model's files, or it would not have been loaded.
            continue
    if not counts:
        return _declared(config, torch.float32), {}
    main = counts.most_common(1)[0][0]
    return main, {key: dtype for key, dtype in stored.items() if dtype is not main}
