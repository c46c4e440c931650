"""The frozen base shared out among processes by FSDP2, on GPUs and CPUs alike; what is trained stays whole everywhere.

No weight that FSDP manages has a gradient, so all that it does is gather a layer before it is run and before its
backward pass. LoRA layers are put on afterwards, which FSDP does not know of: optimizer, clipping and checkpoints are
those of one process. Processes have to run equally many forward and backward passes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from finetune_trainer.model.decoder import decoder_of
from finetune_trainer.model.row_layers import outermost_layers

SHARE_FOR_WEIGHTS = 0.6
"""Of a device's memory; the rest is for activations, LoRA and optimizer."""

_POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Weights are gathered as they are; autocast decides what is computed in which precision, as in one process."""


def choose_sharding(asked: str, *, world_size: int, base_bytes: int, memory_bytes: int | None) -> bool:
    """Whether the base is shared out instead of held whole by each process.

    Args:
        asked: the job's `sharding`: auto, ddp or fsdp.
        world_size: processes.
        base_bytes: of the frozen weights.
        memory_bytes: of one GPU; None on CPU, where `auto` never shares, since processes may share the memory as well.
    """
    if world_size == 1 or asked == "ddp":
        return False
    if asked == "fsdp":
        return True
    return memory_bytes is not None and base_bytes > SHARE_FOR_WEIGHTS * memory_bytes


def sharding_notice(asked: str, *, world_size: int) -> list[str]:
    """Why `sharding: fsdp` has no effect here, if it has none."""
    if asked != "fsdp" or world_size > 1:
        return []
    return ["sharding: fsdp has no effect in one process: the model is held whole."]


def mesh_shape(
    world_size: int, local_world_size: int, *, base_bytes: int, memory_bytes: int | None
) -> tuple[int] | tuple[int, int]:
    """How processes share the base: (all,), or (copies, processes that share one) with a copy on each node.

    A node's own copy spares the network between nodes, which is much slower than that within. It needs nodes of as many
    processes each, and room for it.

    Args:
        world_size: processes.
        local_world_size: processes of this node.
        base_bytes: of the frozen weights.
        memory_bytes: of one GPU; None on CPU.
    """
    nodes, left_over = divmod(world_size, local_world_size)
    share = base_bytes / local_world_size
    fits = memory_bytes is None or share <= SHARE_FOR_WEIGHTS * memory_bytes
    return (nodes, local_world_size) if nodes > 1 and local_world_size > 1 and not left_over and fits else (world_size,)


def mesh_for(shape: tuple[int] | tuple[int, int], device: torch.device) -> DeviceMesh:
    """The processes that share a copy of the base with this one, in the shape that `mesh_shape` gives.

    Ranks of a node are consecutive. Copies need not know of each other, since no shared weight has a gradient. PEFT
    goes by the name: of weights that a mesh called otherwise shares out it takes the shard for the layer.
    """
    return init_device_mesh(device.type, shape, mesh_dim_names=("copies", "fsdp")[-len(shape) :])["fsdp"]


def shard(base: Any, mesh: DeviceMesh) -> None:
    """Share out the frozen parameters of `base`, a causal language model; on the meta device it costs no memory.

    Each decoder layer is a unit that is gathered by itself, so is each embedding before the layers, and what else the
    decoder has. Outside the decoder each part is one: output heads, towers. What weights were tied are two.

    Args:
        base: parameters that do not require gradients are shared out; before its LoRA layers are made.
        mesh: see `mesh_for`.
    """
    # Nobody changes in place what a decoder or a head returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    decoder = decoder_of(base)
    units = [unit for layer in outermost_layers(decoder) for unit in _units(layer)]
    within = {module for unit in units for module in unit.modules()}
    embeddings = [part for part in decoder.modules() if isinstance(part, nn.Embedding) and part not in within]
    _untie(base)
    ignored = {parameter for parameter in base.parameters() if not _can_be_shared(parameter)}
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": _POLICY, "ignored_params": ignored}
    for unit in [*_shared_modules(units), *units]:
        fully_shard(unit, reshard_after_forward=True, **settings)
    # Models that embed a text with images read a weight of the embedding besides.
    read = base.get_input_embeddings() if decoder not in base.children() else None
    for unit in embeddings:
        # The backward pass of a frozen embedding needs no weight.
        fully_shard(unit, reshard_after_forward=unit is not read, **settings).set_unshard_in_backward(False)
    fully_shard(decoder, **settings)
    for unit in _beside(base, decoder):
        fully_shard(unit, reshard_after_forward=False, **settings)


def begin(base: Any) -> None:
    """Tell the sharded decoder, on its device, that it is the whole that its parts belong to.

    FSDP learns it from who is run first, and models that embed a text with images embed it outside the decoder.
    """
    state: Any = fully_shard.state(decoder_of(base))  # type: ignore[attr-defined]  # torch's decorator adds it
    state._lazy_init()  # noqa: SLF001  there is no other way but to run it


@contextmanager
def gathered(base: Any) -> Iterator[None]:
    """What `base` has outside its decoder and is run in here (the output head) is gathered once, however often it is
    run, forwards and backwards, and shared out again at the end. Without effect where nothing is sharded.
    """
    parts = [part for part in _beside(base, decoder_of(base)) if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_backward(False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_backward(True)
            part.reshard()


def _can_be_shared(parameter: nn.Parameter) -> bool:
    return not parameter.requires_grad and parameter.ndim > 0 and parameter.is_contiguous()


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """`module`, or its parts if it only holds them."""
    if next(module.parameters(), None) is None:
        return
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for child in module.children():
            yield from _units(child)
    else:
        yield module


def _shared_modules(units: Iterable[nn.Module]) -> list[nn.Module]:
    """What several units have as a part, the outermost of each; FSDP lets every weight have one owner only."""
    owners = Counter(module for unit in units for module in unit.modules())
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        if owners[module] > 1:
            found.update(dict.fromkeys(_units(module)))
        else:
            for child in module.children():
                visit(child)

    for unit in units:
        visit(unit)
    return list(found)


def _beside(base: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """Parts of `base` that have parameters and are not, nor hold, its decoder; the outermost."""
    found = []
    for child in base.children():
        if child is decoder:
            continue
        holds = any(module is decoder for module in child.modules())
        found += _beside(child, decoder) if holds else list(_units(child))
    return found


def _untie(base: nn.Module) -> None:
    """Give every module a parameter of its own, since units share none."""
    seen: set[nn.Parameter] = set()
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(parameter)
