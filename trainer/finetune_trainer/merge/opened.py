"""The two halves of a merge as they are found: an adapter's folder, and the base model that it names, in floats."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finetune_api.outcome import Reason
from finetune_api.storage_uri import UriError, parse_output
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.model.adapter_state import put_tensors
from finetune_trainer.model.load import load_config, load_model
from finetune_trainer.storage import MANIFEST_NAME, open_store
from finetune_trainer.storage.hub import download_snapshot
from finetune_trainer.storage.manifest import parse_manifest, verify_tree

CONFIG = "adapter_config.json"
_CONFIG_LIMIT_BYTES = 10_000_000
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DEQUANTIZED_WHEN_LOADED = ("fp8", "mxfp4")
_DEQUANTIZED_AFTERWARDS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on this machine."""

    path: Path
    name: str
    """As the user wrote it."""
    base_model: str | None
    revision: str | None


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
        folder = Path(name).expanduser()
        if name.startswith("hf://"):
            folder = _from_hub(name)
        elif "://" in name:
            folder = Path(scratch) / "adapter"
            open_store(name).download_tree("", folder)
        if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file():
            folder = folder / "adapter"
        if not (folder / CONFIG).is_file():
            what = f"{name} holds no {CONFIG}" if folder.is_dir() else f"There is no folder {name}"
            raise JobError(Reason.MODEL_NOT_FOUND, f"{what}: name the folder `adapter` of a finished job.")
        if (manifest := folder / MANIFEST_NAME).is_file():
            verify_tree(folder, parse_manifest(manifest.read_bytes(), str(manifest)), name)
        yield _described(folder, name)


def _from_hub(name: str) -> Path:
    """The files at the top of a model repository, where its adapter is. Nothing is written there."""
    try:
        address = parse_output(name)
    except UriError as error:
        raise JobError(Reason.INVALID_SPEC, str(error)) from error

    def top(paths: Iterable[str]) -> list[str]:
        return [path for path in paths if "/" not in path and not path.startswith(".")]

    return download_snapshot(address.container, address.revision, top, key="the adapter").path


def _described(folder: Path, name: str) -> AdapterFolder:
    file = folder / CONFIG
    try:
        with file.open("rb") as stream:
            # Cut off, it is no JSON.
            content = json.loads(stream.read(_CONFIG_LIMIT_BYTES))
        kind, base, revision = (content.get(key) for key in ("peft_type", "base_model_name_or_path", "revision"))
    except (OSError, ValueError, AttributeError) as error:
        raise JobError(
            Reason.INVALID_SPEC, f"{file} is no adapter's configuration ({first_line(error)}): copy the adapter again."
        ) from error
    if kind != "LORA":
        raise JobError(Reason.INVALID_SPEC, f"{name} is no LoRA adapter (peft_type: {kind}): others are not merged.")
    if content.get("alora_invocation_tokens"):
        raise JobError(
            Reason.INVALID_SPEC,
            f"{name} acts only behind certain tokens (alora_invocation_tokens), which no merged weight can: serve it "
            "as an adapter.",
        )
    named = [value if isinstance(value, str) and value else None for value in (base, revision)]
    return AdapterFolder(folder, name, *named)


def load_base(folder: Path, *, dtype: torch.dtype, name: str, trust_remote_code: bool) -> BaseModel:
    """The model in `folder` with plain weights in `dtype`; quantized ones are dequantized where transformers can.

    Raises:
        JobError: ModelUnsupported, it cannot be loaded or dequantized.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code, name=name)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        notices: list[str] = []
        model = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code, name=name, notices=notices)
        model.config.use_cache = _use_cache(config)
        return BaseModel(model, config, *_published(folder, config), notices)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    method = str(getattr(method, "value", method))
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


def put_adapter(base: Any, adapter: AdapterFolder, base_name: str) -> Any:
    """The PeftModel of `base` with the adapter on it, opened by plain PEFT.

    Raises:
        JobError: InvalidSpec, it does not fit.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights

    model: Any = None
    try:
        device = str(next(base.parameters()).device)
        with warnings.catch_warnings():
            # Of keys that others put beside PEFT's, of transposed weights, and of tied ones, which are taken apart.
            warnings.simplefilter("ignore", UserWarning)
            model = PeftModel.from_pretrained(base, str(adapter.path), torch_device=device)
        mapping = getattr(base, "_checkpoint_conversion_mapping", None)
        # PEFT only warns of tensors that found no place.
        fault = put_tensors(model, load_peft_weights(str(adapter.path), device="cpu", key_mapping=mapping))
    except Exception as error:  # PEFT lets whatever a foreign folder causes through.
        fault = first_line(error)
    if fault is not None:
        raise JobError(
            Reason.INVALID_SPEC,
            f"The adapter {adapter.name} does not fit {base_name} ({fault}): check that it was trained on that model.",
        )
    return model.eval()


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
