"""Everything a run needs to continue exactly where it was, to and from a folder.

Works for a plain model, under DDP and under FSDP2: the sharded states are gathered whole, so a checkpoint does not
depend on how it was sharded. All ranks call these functions together; rank 0 writes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.train.collective import Ranks

ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"
RANDOM = "random.pt"


def adapter_state(model: Any, wrapped: Any) -> dict[str, torch.Tensor]:
    """LoRA weights in PEFT's names, on CPU.

    Args:
        model: the PeftModel.
        wrapped: the same as training runs it (DDP, FSDP2 or itself).
    """
    from peft import get_peft_model_state_dict

    sharded = None
    if any(_is_sharded(parameter) for parameter in wrapped.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        sharded = get_model_state_dict(wrapped, options=options)
    # save_embedding_layers: never ask a hub for the base model's vocabulary, and never write the embedding matrix.
    state = get_peft_model_state_dict(model, state_dict=sharded, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_adapter_state(model: Any, folder: Path) -> None:
    """Put the LoRA weights of a checkpoint or adapter folder into a PeftModel that is not wrapped yet."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / ADAPTER))


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
