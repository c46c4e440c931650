"""The base model shared out while it is loaded: rank 0 alone reads the weights, and no other process ever holds them.

Every process builds the model without weights, shares that out, and takes its part of each tensor as rank 0 sends it, a
piece at a time. Buffers are sent too, so all of them are what loading made of them on rank 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from finetune_trainer.errors import JobError, first_line
from finetune_trainer.model.load import as_frozen
from finetune_trainer.model.sharding import begin, shard
from finetune_trainer.model.support import unsupported

PIECE_BYTES = 2**28
"""Of a tensor on its way: what a process holds beside its own part of the model."""

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and precision of a tensor."""


def load_shards(
    source: Any | None,
    config: Any,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    name: str,
    from_first: Callable[[Any], Any],
) -> Any:
    """The frozen base model on `device`, shared out; every process calls this.

    Args:
        source: on rank 0 the model as `load_model` returns it, on CPU; it is emptied, since its weights may take
            memory. None on all others.
        config: of the model's folder.
        mesh: see `sharding.mesh_for`.
        device: what this process trains on.
        dtype: precision of the weights that have none of their own.
        trust_remote_code: whether Python code in the folder may run.
        name: what the user calls the model.
        from_first: rank 0's value on every rank.

    Raises:
        JobError: ModelUnsupported, the model cannot be built without weights, or not as it was loaded.
    """
    base = _empty(config, dtype, name, trust_remote_code=trust_remote_code)
    told = from_first(None if source is None else (dict(_kinds(source)), source.generation_config))
    wanted, base.generation_config = told
    agree(base, wanted, name)
    base = as_frozen(base.eval())
    shard(base, mesh)
    base.to_empty(device=device)
    _fill(base, source, device)
    begin(base)
    return base


def _empty(config: Any, dtype: torch.dtype, name: str, *, trust_remote_code: bool) -> Any:
    """The model with parameters on the meta device; what else its code makes of tensors is real."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]  # it has no marker
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except Exception as error:  # Model code that nobody here has seen.
            raise _cannot(name, f"its code does not bear to be built without weights ({first_line(error)})") from error


def _cannot(name: str, why: str) -> JobError:
    return unsupported(name, f"cannot be shared out among processes, {why}: set sharding: ddp, or name another model")


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _kinds(model: nn.Module) -> Iterator[tuple[str, Kind]]:
    return ((key, (tuple(tensor.shape), tensor.dtype)) for key, tensor in _tensors(model))


def agree(base: nn.Module, wanted: dict[str, Kind], name: str) -> None:
    """Give each tensor of `base` the precision that it was loaded in; some stay in float32.

    Raises:
        JobError: ModelUnsupported, they are not the same tensors.
    """
    found = dict(_tensors(base))
    differing = sorted(
        found.keys() ^ wanted.keys() or {key for key in found if tuple(found[key].shape) != wanted[key][0]}
    )
    if differing:
        raise _cannot(name, f"it is loaded with other tensors than its configuration makes ({differing[0]})")
    for key, tensor in found.items():
        if tensor.dtype != wanted[key][1]:
            path, _, leaf = key.rpartition(".")
            new: torch.Tensor = torch.empty_like(tensor, dtype=wanted[key][1])
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=False)
            setattr(base.get_submodule(path), leaf, new)


def _fill(base: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Send what rank 0 has of `source` to the same tensors of `base` everywhere."""
    full = dict(_tensors(source)) if source is not None else {}
    left = Counter(id(tensor) for tensor in full.values())
    done: set[torch.Tensor] = set()
    for key, tensor in _tensors(base):
        sent = full.pop(key, None)
        if tensor not in done and tensor.numel():
            done.add(tensor)
            _receive(tensor.detach(), None if sent is None else sent.detach(), device)
        if sent is not None:
            left[id(sent)] -= 1
            if not left[id(sent)]:
                sent.data = torch.empty(0, dtype=sent.dtype)


def _receive(tensor: torch.Tensor, full: torch.Tensor | None, device: torch.device) -> None:
    """Fill this process's part of `tensor` from rank 0's `full`, of the same shape, a few rows at a time."""
    rows, *row = tensor.shape or (1,)
    part, first = tensor, 0
    if isinstance(tensor, DTensor):
        part = tensor.to_local()
        first = math.ceil(rows / tensor.device_mesh.size()) * tensor.device_mesh.get_local_rank()
    part = part.view(-1, *row) if row else part.view(-1)
    step = max(1, PIECE_BYTES // max(math.prod(row) * tensor.element_size(), 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if full is None:
            piece = torch.empty((stop - start, *row), dtype=tensor.dtype, device=device)
        else:
            piece = full.reshape(rows, *row)[start:stop].to(device).contiguous()
        # As bytes, since not every backend knows every type.
        dist.broadcast(piece.view(-1).view(torch.uint8), src=0)
        low, high = max(start, first), min(stop, first + len(part))
        if low < high:
            part[low - first : high - first] = piece[low - start : high - start]
