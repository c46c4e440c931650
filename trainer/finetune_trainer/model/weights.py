"""Whether a folder holds every weight of its model: what is missing would be made up at random, and trained in silence.

The headers of safetensors files (some kilobytes each) tell names, types and shapes. transformers' own loading code runs
over them with tensors that have no content, so whatever it renames, splits, stacks or ties counts as it will be loaded.
Files of other formats are judged by what loading them reports.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.support import unsupported

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
_HEADS = re.compile(r"(^|\.)(scores?|classifier|classification_head|(v|value|reward|rm)_head|qa_outputs)\b")
_FILE_NAME = re.compile(r"[\w-][\w .+-]{0,254}")
_SHOWN = 3


@dataclass(frozen=True)
class LoadingInfo:
    """What transformers says of the weights that it loaded."""

    missing: Collection[str] = ()
    """Names that the model has and the folder has not."""
    unexpected: Collection[str] = ()
    mismatched: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default=())
    """(name, shape in the folder, shape in the model)."""

    @classmethod
    def from_transformers(cls, info: dict[str, Any]) -> LoadingInfo:
        """Of the dictionary that `output_loading_info=True` returns."""
        mismatched = [(name, tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]]
        return cls(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), sorted(mismatched))


def check_headers(folder: Path, skeleton: Any, name: str) -> None:
    """Refuse a folder of safetensors that lacks weights, has others, or is damaged, before one of them is read.

    Args:
        folder: the model's folder. Of other formats nothing can be told beforehand.
        skeleton: the model without weights; see support.build_skeleton.
        name: what the user calls the model.

    Raises:
        JobError: ModelUnsupported.
    """
    files = _safetensors(folder, name)
    tensors = {key: tensor for file in files for key, tensor in _header(file, name).items()}
    if not tensors or getattr(skeleton.config, "quantization_config", None) is not None:
        return
    _refuse_whole_numbers(tensors, name)
    info = _rehearse(skeleton, tensors)
    if info is not None:
        check_loaded(info, skeleton, name)


def check_names(folder: Path, skeleton: Any, name: str) -> None:
    """As check_headers, from the names in a sharded model's index: before its weights are downloaded.

    Raises:
        JobError: ModelUnsupported.
    """
    if not (folder / _INDEX).is_file() or getattr(skeleton.config, "quantization_config", None) is not None:
        return
    wanted, prefix = skeleton.state_dict(), f"{skeleton.base_model_prefix}."
    known = {key: wanted.get(key, wanted.get(prefix + key)) for key in _index(folder, name)}
    nothing = torch.empty(1, 1, device="meta")
    info = _rehearse(skeleton, {key: nothing if tensor is None else tensor for key, tensor in known.items()})
    # Shapes stand in the headers only, and what is split or stacked while it is loaded cannot be told without them.
    if info is not None and {key for key in known if known[key] is None} <= set(info.unexpected):
        check_loaded(LoadingInfo(info.missing, info.unexpected), skeleton, name)


def check_loaded(info: LoadingInfo, model: Any, name: str) -> list[str]:
    """Refuse a model that was not loaded whole; the sentences are about weights that it has no place for.

    Raises:
        JobError: ModelUnsupported, with the first names and the likely reason.
    """
    missing = list(info.missing)
    if getattr(model.config, "quantization_config", None) is not None:
        # A quantized layer's weight is kept under other names.
        missing = [key for key in missing if key.endswith(".bias") or "norm" in key or "embed" in key]
    if missing:
        total = len(model.state_dict())
        raise unsupported(name, f"lacks {_counted(missing, total)}{_why(missing, info.unexpected, model)}")
    if info.mismatched:
        key, found, wanted = next(iter(info.mismatched))
        raise unsupported(
            name,
            f"has weights of other sizes than its config.json says ({len(info.mismatched)}; {key} is "
            f"{_shape(found)}, the configuration makes it {_shape(wanted)}): take config.json and weights from the "
            "same place",
        )
    if not info.unexpected:
        return []
    count = len(info.unexpected)
    made = type(model).__name__
    return [f"{name} has weights that {made} has no place for, they are not used ({count}: {_first(info.unexpected)})."]


def _why(missing: list[str], unexpected: Collection[str], model: Any) -> str:
    """The likely reason why weights are missing, and what to do."""
    made = type(model).__name__
    ends = {_end(key) for key in missing}
    if 2 * len([key for key in unexpected if _end(key) in ends]) > len(missing):
        return (
            f", and holds {len(unexpected)} that {made} has no place for ({_first(unexpected)}): it was saved by a "
            "model class of other names, such as a wrapper for images or sound; save it as "
            f"{made}, or name a model that was"
        )
    if any(re.search(r"(^|\.)encoder\.layers?\.", key) for key in unexpected):
        return (
            f": it is an encoder-decoder, and {made} does not find what the decoder shares with the encoder; name a "
            "causal language model"
        )
    outputs = {id(parameter) for parameter in _output_layer(model)}
    head = [key for key in missing if id(_parameter(model, key)) in outputs or re.search(r"(^|\.)(lm_head|cls)\.", key)]
    if len(head) == len(missing):
        other = [key for key in unexpected if _HEADS.search(key)]
        if other:
            return (
                f": it is a classifier or reward model ({other[0]} stands in place of the output layer), name the "
                "language model that it was made from"
            )
        what = "an encoder" if getattr(model.config, "is_decoder", None) is False else "a headless model"
        return f": it is {what}, saved without the output layer that makes it a language model, name one that has it"
    return ": the folder is incomplete or its config.json is another model's, fetch it anew"


def _end(key: str) -> str:
    """Layer and parameter without what a wrapper puts in front (`layers.0.mlp.up_proj.weight`)."""
    match = re.search(r"(?:^|\.)((?:layers?|h|blocks?)\.\d+\..*)$", key)
    return match.group(1) if match else ".".join(key.split(".")[-2:])


def _output_layer(model: Any) -> list[Any]:
    layer = model.get_output_embeddings()
    return list(layer.parameters()) if isinstance(layer, torch.nn.Module) else []


def _parameter(model: Any, key: str) -> Any:
    try:
        return model.get_parameter(key)
    except AttributeError:
        return None


def _rehearse(skeleton: Any, tensors: dict[str, torch.Tensor]) -> LoadingInfo | None:
    """What loading `tensors`, which are on the meta device, would report; None when that cannot be rehearsed."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        _, info = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception:  # Some conversions need content. What loading reports is checked as well.
        return None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return LoadingInfo.from_transformers(info)


def _safetensors(folder: Path, name: str) -> list[Path]:
    """The files that transformers would load, if it would load safetensors."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if not (folder / _INDEX).is_file():
        return []
    shards = sorted(set(_index(folder, name).values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise unsupported(
            name, f"lacks {len(absent)} of its {len(shards)} weight files ({_first(absent)}): fetch the folder anew"
        )
    return [folder / shard for shard in shards]


def _index(folder: Path, name: str) -> dict[str, str]:
    """File of each weight, by name."""
    try:
        return {
            str(key): _file_name(file) for key, file in json.loads((folder / _INDEX).read_bytes())["weight_map"].items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise unsupported(name, f"has a damaged {_INDEX}: fetch the folder anew") from error


def _file_name(value: Any) -> str:
    """`value`, if it is the name of a file in its folder."""
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no file name")
    return value


def _header(file: Path, name: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, without content.

    Format: 8 bytes of header length, little endian; a JSON object; the tensors, one behind the other
    (https://huggingface.co/docs/safetensors).
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        text = stream.read(length) if length <= _LONGEST_HEADER_BYTES else b""
    if start == b"version ":
        raise unsupported(name, f"has a Git LFS pointer for {file.name}: fetch the file itself (git lfs pull)")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((operator.index(entry["data_offsets"][1]) for entry in header.values()), default=0)
        tensors = {
            key: torch.empty(entry["shape"], dtype=_TYPES.get(entry["dtype"], torch.float32), device="meta")
            for key, entry in header.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise unsupported(name, f"has a damaged {file.name}, which is no safetensors file: fetch it anew") from error
    if size < 8 + length + end:
        raise JobError(
            Reason.MODEL_UNSUPPORTED,
            f"{name} has a {file.name} that is cut off ({size:,} of {8 + length + end:,} bytes): fetch it anew.",
        )
    return tensors


def _refuse_whole_numbers(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Weights in whole numbers are quantized, and mean nothing without their scales."""
    odd = [
        key
        for key, tensor in tensors.items()
        if tensor.dim() > 1 and not tensor.dtype.is_floating_point and key.endswith("weight")
    ]
    if odd:
        kind = str(tensors[odd[0]].dtype).removeprefix("torch.")
        raise unsupported(
            name,
            f"holds weights in whole numbers ({odd[0]} is {kind}), but its config.json says nothing of a quantization: "
            "name the model that was not quantized",
        )


def _counted(missing: list[str], total: int) -> str:
    return f"{len(missing)} of its {total} weights ({_first(missing)})"


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
