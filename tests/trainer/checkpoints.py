"""Checkpoints for tests, with all that a run goes on from."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.checkpoint_files import ADAPTER, OPTIMIZER, RANDOM
from finetune_trainer.train.state import random_state


def save_checkpoint(
    checkpoints: Checkpoints, folder: Path, step: int, *, loss: float | None = None, value: float | None = None
) -> None:
    """Make the checkpoint of `step` in `folder`, and publish it. Its adapter is one value: `value`, or the step."""
    folder.mkdir()
    save_file({"a": torch.tensor([float(step) if value is None else value])}, folder / ADAPTER)
    torch.save({"a": {}}, folder / OPTIMIZER)
    torch.save([random_state()], folder / RANDOM)
    checkpoints.seal(folder, step=step, eval_loss=loss, details={})
    checkpoints.upload(folder, step)
    checkpoints.prune()
