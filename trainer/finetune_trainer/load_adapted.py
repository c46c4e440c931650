"""The base model with the adapter that is to be trained, new, continued or resumed."""

from __future__ import annotations

from typing import Any

import torch

from finetune_api.job import FineTuneJobSpec
from finetune_trainer.model.adapter_state import adapter_tensors, digests
from finetune_trainer.model.load import load_model, training_dtype
from finetune_trainer.model.lora import add_lora, continue_lora, kept_settings
from finetune_trainer.model.reach import reached_by_text
from finetune_trainer.model.targets import candidates, resolve_targets
from finetune_trainer.pins import fetch_initial_adapter, fetch_weights
from finetune_trainer.preparation import Prepared, Surroundings
from finetune_trainer.publish.merged import sharded_notice
from finetune_trainer.train import state as saved
from finetune_trainer.train.arguments import choose_sharding
from finetune_trainer.train.collective import Ranks


def load_adapted(
    spec: FineTuneJobSpec, prepared: Prepared, around: Surroundings, device: torch.device
) -> tuple[Any, dict[str, str]]:
    """The PeftModel, and the digests of the adapter's tensors as training begins with them (on rank 0).

    Raises:
        JobError: the weights cannot be had, are not all there, or have no layer that lora_config could adapt.
    """
    pins, ranks = prepared.pins, around.ranks
    around.console.phase(f"Loading {pins.base.address}")
    told: list[str] = []
    folder = ranks.on_node_first(lambda: fetch_weights(spec, pins))
    trusted, name = spec.trust_remote_code, pins.base.address
    base = load_model(folder, dtype=training_dtype(device), trust_remote_code=trusted, name=name, notices=told)
    sharded = is_sharded(spec, base, ranks, device)
    told += sharded_notice(spec, sharded=sharded)
    if not sharded:
        base.to(device)
    torch.manual_seed(spec.seed)
    initial = pins.initial_adapter
    if initial is None:
        ((ids, _), *_) = prepared.train.sequences(int(prepared.train.row_tokens.argmax()))
        targets = resolve_targets(base, spec.lora_config, reached_by_text(base, candidates(base), ids.tolist()))
        # What its configuration told was said before the weights were fetched.
        told += [sentence for sentence in targets.notices if sentence not in prepared.notices]
        model = add_lora(base, spec.lora_config, targets)
    else:
        model = continue_lora(base, ranks.on_node_first(lambda: fetch_initial_adapter(initial)))
        told += kept_settings(model, spec.lora_config)
    for sentence in told:
        around.console.warning(sentence)
    prepared.notices.extend(told)
    # A resumed run began here too.
    start = digests(adapter_tensors(model)) if ranks.is_first else {}
    if prepared.resume_folder is not None:
        saved.load_adapter_state(model, prepared.resume_folder)
    return model, start


def is_sharded(spec: FineTuneJobSpec, model: Any, ranks: Ranks, device: torch.device) -> bool:
    """Whether the base model is to be shared out among the processes."""
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
    return choose_sharding(spec.sharding, device=device, world_size=ranks.world_size, base_bytes=base_bytes)
