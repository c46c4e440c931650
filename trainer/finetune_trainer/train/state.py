"""Everything a run needs to continue exactly where it was, to and from a folder.

What is trained is whole on every rank, so a checkpoint does not depend on how the base was shared out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.model.adapter_state import adapter_tensors, not_finite, put_tensors
from finetune_trainer.train.checkpoint_files import ADAPTER, OPTIMIZER, RANDOM, load_saved
from finetune_trainer.train.collective import Ranks


def adapter_state(model: Any, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a PeftModel's adapter as they go into a file, on CPU.

    One with a value that is no number becomes no checkpoint: it would be what a next attempt goes on from.

    Raises:
        JobError: LossDiverged; or ModelUnsupported, as `adapter_tensors`.
    """
    adapter = adapter_tensors(model)
    if broken := not_finite(adapter):
        raise JobError(
            Reason.LOSS_DIVERGED,
            f"After step {step} the adapter has values that are no numbers (in {broken[0]}), {len(broken)} of its "
            f"{len(adapter)} tensors: lower learning_rate, raise num_warmup_steps or look for broken rows in the data.",
        )
    return adapter


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


def optimizer_state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer keeps of each parameter, by the parameter's name, on CPU."""
    states = {name: optimizer.state[parameter] for name, parameter in _trained(model)}
    return {name: {key: value.cpu() for key, value in state.items()} for name, state in states.items()}


def load_optimizer_state(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Put the optimizer's state of a checkpoint back; the optimizer has one group, of all that `model` trains.

    Raises:
        JobError: CheckpointMismatch, it is none of these weights'.
    """
    found = load_saved(folder / OPTIMIZER)
    with _refused(OPTIMIZER, LookupError, TypeError, ValueError, AttributeError, AssertionError):
        # Earlier images wrote it under a key.
        found = found.get("state", found)
        state = {number: _state_of(parameter, found[name]) for number, (name, parameter) in enumerate(_trained(model))}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _state_of(parameter: torch.Tensor, found: dict[str, Any]) -> dict[str, Any]:
    for key in ("exp_avg", "exp_avg_sq"):
        if found[key].shape != parameter.shape:
            raise ValueError(f"{key} has the shape {tuple(found[key].shape)} in place of {tuple(parameter.shape)}")
    return found


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def random_state() -> dict[str, Any]:
    """State of this process's random generators."""
    state: dict[str, Any] = {"python": random.getstate(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(folder: Path, ranks: Ranks) -> None:
    """Put this rank's random generators back where the checkpoint left them.

    Raises:
        JobError: CheckpointMismatch, it holds no state of generators.
    """
    state = load_saved(folder / RANDOM)[ranks.rank]
    with _refused(RANDOM, LookupError, TypeError, ValueError, RuntimeError):
        set_random_state(state)


def set_random_state(state: dict[str, Any]) -> None:
    """Put this process's random generators back to `random_state()`."""
    random.setstate(state["python"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def _refused(name: str, *errors: type[Exception]) -> Iterator[None]:
    """`errors` within the block mean that the checkpoint's file `name` is not what this run has written."""
    try:
        yield
    except errors as error:
        raise JobError(
            Reason.CHECKPOINT_MISMATCH,
            f"The checkpoint to resume from does not fit this run, its {name} is refused ({first_line(error)}): choose "
            "another output, or remove the checkpoints there.",
        ) from error
