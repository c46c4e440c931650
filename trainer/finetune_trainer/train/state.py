"""Everything a run needs to continue exactly where it was, to and from a folder.

Works for a plain model, under DDP and under FSDP2: the sharded states are gathered whole, so a checkpoint does not
depend on how it was sharded. All ranks call these functions together; rank 0 writes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.adapter_state import adapter_tensors, not_finite, put_tensors
from finetune_trainer.train.checkpoint import ADAPTER
from finetune_trainer.train.collective import Ranks

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"
RANDOM = "random.pt"


def adapter_state(model: Any, wrapped: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors as they go into a file, on CPU.

    Args:
        model: the PeftModel.
        wrapped: the same as training runs it (DDP, FSDP2 or itself).
    """
    sharded = None
    if any(_is_sharded(parameter) for parameter in wrapped.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        sharded = get_model_state_dict(wrapped, options=options)
    return adapter_tensors(model, sharded)


def refuse_not_finite(adapter: dict[str, torch.Tensor], step: int) -> None:
    """Let no adapter with a value that is no number become a checkpoint: it would be what a next attempt goes on from.

    Raises:
        JobError: LossDiverged.
    """
    if broken := not_finite(adapter):
        raise JobError(
            Reason.LOSS_DIVERGED,
            f"After step {step} the adapter has values that are no numbers (in {broken[0]}), {len(broken)} of its "
            f"{len(adapter)} tensors: lower learning_rate, raise num_warmup_steps or look for broken rows in the data.",
        )


def load_adapter_state(model: Any, folder: Path) -> None:
    """Put the adapter of a checkpoint into a PeftModel that is not wrapped yet.

    Raises:
        JobError: CheckpointMismatch, it is not whole or not this model's.
    """
    fault = put_tensors(model, load_file(folder / ADAPTER))
    if fault is not None:
        raise JobError(
            Reason.CHECKPOINT_MISMATCH,
            f"The checkpoint to resume from does not fit this model, {fault}: choose another output, or remove the "
            "checkpoints there.",
        )


def optimizer_state(wrapped: Any, optimizer: Any) -> dict[str, Any]:
    """The optimizer's whole state, on CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    inner = getattr(optimizer, "optimizer", optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(wrapped, inner, options=options))


def load_optimizer_state(wrapped: Any, optimizer: Any, folder: Path) -> None:
    """Put the optimizer's state of a checkpoint back."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    inner = getattr(optimizer, "optimizer", optimizer)
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(wrapped, inner, state, options=StateDictOptions(full_state_dict=True))


def random_state() -> dict[str, Any]:
    """State of this process's random generators."""
    state: dict[str, Any] = {"python": random.getstate(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(folder: Path, ranks: Ranks) -> None:
    """Put this rank's random generators back where the checkpoint left them."""
    set_random_state(torch.load(folder / RANDOM, weights_only=True)[ranks.rank])


def set_random_state(state: dict[str, Any]) -> None:
    """Put this process's random generators back to `random_state()`."""
    random.setstate(state["python"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_sharded(parameter: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)
