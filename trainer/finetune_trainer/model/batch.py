"""What goes through the model at once: sequences of tokens, and what each position must predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

IGNORED = -100
"""Target of a position that predicts nothing, as cross_entropy's ignore_index."""

Array = np.ndarray[Any, np.dtype[Any]]

TokenPair = tuple[Array, Array]


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences."""

    input_ids: torch.Tensor
    """int64 [B, L]."""
    attention_mask: torch.Tensor
    """int64 [B, L], 0 on padding."""
    targets: torch.Tensor
    """int64 [B, L]: the token that position i must predict, that is number i+1, or IGNORED."""
    positions: torch.Tensor
    """int64 [P], P >= 1: the positions at which any row predicts something; found here, so that no step waits for a
    GPU to count them."""

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        if device == self.input_ids.device:
            return self
        tensors = (self.input_ids, self.attention_mask, self.targets, self.positions)
        return Batch(*(moved(tensor, device) for tensor in tensors))


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`; whoever asks for one on a GPU does not wait for it, nor for what the GPU does meanwhile."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pad(sequences: Sequence[TokenPair], pad_id: int, length: int | None = None) -> Batch:
    """Right-pad sequences of (ids [L], trained [L]) to the longest of them, or to `length`."""
    width = max(length or 0, *(len(ids) for ids, _ in sequences))
    input_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    targets = np.full((len(sequences), width), IGNORED, dtype=np.int64)
    for row, (ids, trained) in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        targets[row, : len(ids) - 1] = np.where(trained[1:], ids[1:], IGNORED)
    # A batch without targets still runs the head once, so that every rank uses the same parameters.
    positions = np.flatnonzero((targets != IGNORED).any(axis=0))
    positions = positions if len(positions) else np.zeros(1, dtype=np.int64)
    return Batch(*(torch.from_numpy(array) for array in (input_ids, mask, targets, positions)))


def without_targets(batch: Batch) -> Batch:
    """The same with nothing to predict: its loss is 0, and so is its gradient."""
    return replace(batch, targets=torch.full_like(batch.targets, IGNORED), positions=batch.positions[:1])
