"""What the files of a checkpoint must be like before a run goes on from them.

Digests only tell that they are what the manifest's writer listed, and whoever may write to an output can write a
manifest. Nothing in them is ever run: pickles hold tensors and plain values alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune_trainer.errors import first_line
from finetune_trainer.model.adapter_state import not_finite

ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.pt"
RANDOM = "random.pt"


def load_saved(file: Path) -> Any:
    """What `torch.save` wrote, on CPU. Raises whatever a file that it did not write makes of it."""
    return torch.load(file, map_location="cpu", weights_only=True)


def adapter_fault(folder: Path) -> str | None:
    """The end of a sentence about an adapter's file that cannot be gone on from; None when it can."""
    try:
        tensors = load_file(folder / ADAPTER)
    except MemoryError:
        raise
    except Exception as error:  # Of a foreign file anything may be raised.
        return _unreadable(ADAPTER, error)
    return "because its adapter has values that are no numbers." if not_finite(tensors) else None


def resume_fault(folder: Path, world_size: int | None = None) -> str | None:
    """As adapter_fault, of all that a run needs to go on.

    Args:
        folder: copy of the checkpoint.
        world_size: processes of the run; None when it does not say.
    """
    for name, fits in ((OPTIMIZER, _is_optimizer), (RANDOM, _is_random)):
        try:
            content = load_saved(folder / name)
        except MemoryError:
            raise
        except Exception as error:  # As above.
            return _unreadable(name, error)
        if not fits(content, world_size):
            return f"because it is damaged: {name} does not hold what a run goes on from."
    return adapter_fault(folder)


def _is_optimizer(content: Any, _world_size: int | None) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(key, str) for key in content)


def _is_random(content: Any, world_size: int | None) -> bool:
    return (
        isinstance(content, list)
        and len(content) == (world_size or len(content) or 1)
        and all(isinstance(state, dict) and {"python", "cpu"} <= state.keys() for state in content)
    )


def _unreadable(name: str, error: Exception) -> str:
    missing = isinstance(error, FileNotFoundError)
    return f"because it is damaged: {name} {'is missing' if missing else f'cannot be read ({first_line(error)})'}."
