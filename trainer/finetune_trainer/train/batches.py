"""Rows of an optimizer step -> the padded batches one rank runs for it.

One item is one optimizer step: its batches and the number of trained tokens over all ranks, which the loss is divided
by. Rows of a step are sorted by length first, so little is padded; which rows a step has is the plan's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from finetune_trainer.data.dataset import TokenizedData
from finetune_trainer.model.batch import Batch, pad, without_targets
from finetune_trainer.train.plan import TrainingPlan, share_of_rank


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes for one optimizer step."""

    batches: list[Batch]
    """At least one; a rank without rows has one without targets, so that it takes part in the collectives."""
    trained_tokens: int
    """Targets of the step over all ranks."""
    tokens: int
    """Tokens of the step over all ranks, padding not counted."""


def batches_of_rows(
    data: TokenizedData, rows: Sequence[int], *, rows_per_batch: int, pad_id: int, length: int | None
) -> Iterator[Batch]:
    """Padded batches of `rows_per_batch` rows each, longest first so that memory runs out early if it does."""
    ordered = sorted(rows, key=lambda row: (-int(data.row_tokens[row]), row))
    for start in range(0, len(ordered), rows_per_batch):
        sequences = [pair for row in ordered[start : start + rows_per_batch] for pair in data.sequences(row)]
        yield pad(sequences, pad_id, length)


class StepDataset(Dataset[StepBatches]):
    """Item i is optimizer step i of the plan, for one rank."""

    def __init__(
        self,
        data: TokenizedData,
        plan: TrainingPlan,
        *,
        rank: int,
        world_size: int,
        rows_per_batch: int,
        pad_id: int,
        length: int | None = None,
    ) -> None:
        self._data = data
        self._plan = plan
        self._rank = rank
        self._world_size = world_size
        self._rows_per_batch = rows_per_batch
        self._pad_id = pad_id
        self._length = length

    def __len__(self) -> int:
        return self._plan.total_steps

    def __getitem__(self, step: int) -> StepBatches:
        rows = self._plan.rows_of_step(step)
        mine = [int(row) for row in share_of_rank(rows, self._rank, self._world_size)]
        batches = list(self._batches(mine))
        # Ranks run in step where the model is sharded, so all have as many batches as the one with the most rows.
        wanted = math.ceil(len(share_of_rank(rows, 0, self._world_size)) / self._rows_per_batch)
        filler = batches[-1] if batches else next(self._batches([int(rows[0])]))
        batches += [without_targets(filler)] * (wanted - len(batches))
        return StepBatches(
            batches,
            trained_tokens=int(self._data.row_trained_tokens[rows].sum()),
            tokens=int(self._data.row_tokens[rows].sum()),
        )

    def _batches(self, rows: Sequence[int]) -> Iterator[Batch]:
        return batches_of_rows(
            self._data, rows, rows_per_batch=self._rows_per_batch, pad_id=self._pad_id, length=self._length
        )
