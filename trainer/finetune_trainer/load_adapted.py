"""The base model with the adapter that is to be trained, new, continued or resumed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from finetune_api.job import FineTuneJobSpec
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.adapter_state import adapter_tensors, digests
from finetune_trainer.model.load import load_model, training_dtype
from finetune_trainer.model.load_shards import load_shards
from finetune_trainer.model.lora import add_lora, continue_lora, kept_settings
from finetune_trainer.model.reach import reached_by_text
from finetune_trainer.model.sharding import choose_sharding, gathered, mesh_for, mesh_shape
from finetune_trainer.model.support import build_skeleton
from finetune_trainer.model.targets import candidates, resolve_targets
from finetune_trainer.pins import fetch_initial_adapter, fetch_weights
from finetune_trainer.preparation import Prepared, RunContext
from finetune_trainer.publish.merged import sharded_notice
from finetune_trainer.train import state as saved
from finetune_trainer.train.collective import Ranks


@dataclass(frozen=True)
class Trained:
    """What is trained, and what it was."""

    model: AdaptedModel
    start: dict[str, str]
    """Digests of the adapter's tensors before the first step of the first attempt; on rank 0 only."""


def load_adapted(spec: FineTuneJobSpec, prepared: Prepared, context: RunContext, device: torch.device) -> Trained:
    """The base model with its adapter, on its device, as training goes on from it.

    Raises:
        JobError: the weights cannot be had, are not all there, or have no layer that lora_config could adapt.
    """
    pins, ranks = prepared.pins, context.ranks
    context.console.phase(f"Loading {pins.base.address}")
    told: list[str] = []
    base_bytes = prepared.model.parameters * training_dtype(device).itemsize
    memory_bytes = _memory_bytes(device)
    # Whose weights are quantized is held whole: what FSDP would share out are codes, which mean nothing in part.
    sharded = spec.quantization is None and choose_sharding(
        spec.sharding, world_size=ranks.world_size, base_bytes=base_bytes, memory_bytes=memory_bytes
    )
    told += sharded_notice(spec, sharded=sharded)
    if sharded:
        shape = mesh_shape(ranks.world_size, ranks.local_world_size, base_bytes=base_bytes, memory_bytes=memory_bytes)
        base = _load_shards(spec, prepared, ranks, device, told, mesh_for(shape, device))
    else:
        folder = ranks.on_node_first(lambda: fetch_weights(spec, pins))
        base = _from_folder(folder, spec, prepared, device, told, device)
    torch.manual_seed(spec.seed)
    initial = pins.initial_adapter
    if initial is None:
        ((ids, _), *_) = prepared.train.sequences(int(prepared.train.row_tokens.argmax()))
        reach = reached_by_text(base, candidates(base), ids.tolist())
        # Of what is shared out it cannot be seen any more which weights were tied.
        whole = _skeleton(spec, prepared) if sharded else base
        targets = resolve_targets(whole, spec.lora_config, reach)
        # What its configuration told was said before the weights were fetched.
        told += [sentence for sentence in targets.notices if sentence not in prepared.notices]
        model = add_lora(base, spec.lora_config, targets)
    else:
        model = continue_lora(base, ranks.on_node_first(lambda: fetch_initial_adapter(initial)))
        told += kept_settings(model, spec.lora_config)
    for sentence in told:
        context.console.warning(sentence)
    prepared.notices.extend(told)
    # A resumed run began here too.
    start = digests(adapter_tensors(model)) if ranks.is_first else {}
    if prepared.resume is not None:
        saved.load_adapter_state(model, prepared.resume.folder)
    trained = AdaptedModel(model, device, sharded=sharded, gathered=partial(gathered, base))
    # Disks are not equally fast, and collectives are given up after minutes.
    ranks.barrier()
    if ranks.world_size > 1:
        for parameter in trained.trained:
            dist.broadcast(parameter.data, src=0)
    return Trained(trained, start)


def _memory_bytes(device: torch.device) -> int | None:
    """Of a GPU; None on CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def _load_shards(
    spec: FineTuneJobSpec,
    prepared: Prepared,
    ranks: Ranks,
    device: torch.device,
    told: list[str],
    mesh: DeviceMesh,
) -> Any:
    """Only rank 0's node needs the weights."""
    source = None
    with ranks.failing_together():
        if ranks.is_first:
            source = _from_folder(fetch_weights(spec, prepared.pins), spec, prepared, device, told, torch.device("cpu"))
    return load_shards(
        source,
        prepared.model.config,
        mesh=mesh,
        device=device,
        dtype=training_dtype(device),
        trust_remote_code=spec.trust_remote_code,
        name=prepared.pins.base.address,
        from_first=ranks.from_first,
    )


def _skeleton(spec: FineTuneJobSpec, prepared: Prepared) -> Any:
    name = prepared.pins.base.address
    return build_skeleton(prepared.model.config, name, trust_remote_code=spec.trust_remote_code)


def _from_folder(
    folder: Path, spec: FineTuneJobSpec, prepared: Prepared, device: torch.device, told: list[str], place: torch.device
) -> Any:
    """The base model as it is computed on `device`, on `place`."""
    return load_model(
        folder,
        dtype=training_dtype(device),
        trust_remote_code=spec.trust_remote_code,
        name=prepared.pins.base.address,
        notices=told,
        quantization=spec.quantization,
        device=place,
    )
