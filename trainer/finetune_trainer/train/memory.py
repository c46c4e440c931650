"""How many tokens fit: what the backward pass keeps of each, and what is free on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from finetune_trainer.launch.memory_events import own_cgroup

_USED = 0.6
"""Share of the free memory that activations may take; the rest is for gradients on their way back, chunks of logits and
what the allocator keeps in pieces."""

_ENOUGH = {"cpu": 4096, "cuda": 16384}
"""Tokens of a pack above which larger ones are not faster."""


class KeptBytes:
    """Counts what autograd keeps for the backward pass, parameters and buffers not counted."""

    def __init__(self, model: Any) -> None:
        self.total = 0
        self._known = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the forward passes in here."""
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
            yield

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        address = _address(tensor)
        if address not in self._known:
            self._known.add(address)
            self.total += tensor.untyped_storage().nbytes()
        return tensor


def checkpointed_bytes_per_token(config: Any, kept: float, dtype: torch.dtype, every: int = 1) -> float:
    """What a token takes with activation checkpointing: its input to the layers that are computed again, all of the
    others, and all of the one that is being computed again.

    Args:
        config: the language model's.
        kept: bytes per token without checkpointing.
        dtype: of the activations.
        every: every so many-th layer is computed again.
    """
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    again = math.ceil(layers / every)
    return again * hidden * dtype.itemsize + (layers - again + 1) * kept / layers


def prefix_bytes_per_token(config: Any, dtype: torch.dtype, *, checkpointed: bool) -> float:
    """What a token of a prefix takes besides, for as long as packs lie behind it: float32 sums of the gradients of its
    keys and values, and where layers are computed again, these themselves.

    Args:
        config: the language model's.
        dtype: of the activations.
        checkpointed: whether any layers are.
    """
    heads = _number(config, "num_attention_heads") or 1
    # Where layers differ, the largest.
    sizes = [_number(config, name) for name in ("head_dim", "global_head_dim")]
    size = max(*(each or 0 for each in sizes), (_number(config, "hidden_size") or 0) // heads)
    latent = [_number(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    if _number(config, "kv_lora_rank") and all(latent):
        # Keys and values of all heads are made of what is small.
        width = heads * sum(each or 0 for each in latent)
    else:
        width = 2 * size * (_number(config, "num_key_value_heads") or heads)
    sums = torch.float32.itemsize
    layers = _number(config, "num_hidden_layers") or 1
    return float(layers * width * (sums + (dtype.itemsize if checkpointed else 0)))


def _number(config: Any, name: str) -> int | None:
    """Configurations lack what their model has not, and refuse what differs from layer to layer."""
    try:
        value = getattr(config, name, None)
    except Exception:
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def tokens_that_fit(bytes_per_token: float, *, device: torch.device, processes: int, reserved: int) -> int:
    """Tokens that may be in a pack.

    Args:
        bytes_per_token: what the backward pass keeps of each.
        device: what is trained on.
        processes: how many share this machine's main memory.
        reserved: bytes that training will take besides and has not taken yet.
    """
    free = free_bytes(device, processes) - reserved
    return max(0, int(free * _USED / max(bytes_per_token, 1.0)))


def enough_tokens(device: torch.device) -> int:
    """Tokens of a pack above which larger ones are not faster."""
    return _ENOUGH[device.type]


def free_bytes(device: torch.device, processes: int) -> int:
    """Memory of the device that this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([int(psutil.virtual_memory().available), *_cgroup_free()]) // processes


def _cgroup_free(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What is left below this cgroup's limit, if it has one. Cached files count as free: the kernel drops them."""
    try:
        folder = own_cgroup(proc, root)
        limit = int((folder / "memory.max").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [limit - int((folder / "memory.current").read_text()) + int(stat["inactive_file"])]
    except (OSError, StopIteration, ValueError, KeyError):
        # No limit ("max"), cgroup v1 or another operating system.
        return []


def _address(tensor: torch.Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    return int(local.untyped_storage().data_ptr())
