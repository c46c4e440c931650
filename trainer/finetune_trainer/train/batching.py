"""Rows of an optimizer step -> what one rank runs through the model for it.

One item is one optimizer step: its batches and the number of trained tokens over all ranks, which the loss is divided
by. Which rows a step has is the plan's alone; how they are laid out changes no mathematics, only time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune_api.outcome import BatchLayout
from finetune_trainer.data.dataset import TokenizedData
from finetune_trainer.model.batch import Batch, TokenPair, pad, without_targets
from finetune_trainer.model.prefix_tree import Pack, pack_count, packs_of, without_predictions
from finetune_trainer.train.plan import Array, TrainingPlan, share_of_rank


@dataclass(frozen=True)
class Batching:
    """How sequences become batches."""

    layout: BatchLayout
    tokens_per_pack: int
    """Most tokens of a pack; a longer sequence has one of its own."""
    rows_per_batch: int
    """Rows of a padded batch."""
    pad_id: int
    """Fills padding; it is never attended to nor trained on."""
    length: int | None = None
    """Padded batches are at least so many tokens wide."""
    whole_rows: bool = False
    """Some layers compute each row of a pack whole, so the bound of a pack counts what rows share once for each."""

    @property
    def packs(self) -> bool:
        """Whether batches are packs."""
        return self.layout in (BatchLayout.SHARED_PREFIX, BatchLayout.PACKED)

    def batches(self, rows: Sequence[list[TokenPair]]) -> list[Batch | Pack]:
        """Batches of one or more rows, largest first, so that memory runs out early if it does."""
        if self.packs:
            return [*packs_of(_flat(rows), budget=self.tokens_per_pack, share=self._shares, whole=self.whole_rows)]
        if self.layout is BatchLayout.SINGLE_ROWS:
            return [pad([sequence], self.pad_id) for sequence in sorted(_flat(rows), key=lambda pair: -len(pair[0]))]
        ordered = sorted(rows, key=lambda row: -sum(len(ids) for ids, _ in row))
        starts = range(0, len(ordered), self.rows_per_batch)
        return [pad(_flat(ordered[i : i + self.rows_per_batch]), self.pad_id, self.length) for i in starts]

    def count(self, rows: Sequence[list[TokenPair]]) -> int:
        """How many batches these rows make."""
        if self.packs:
            if not rows:
                return 0
            return pack_count(_flat(rows), budget=self.tokens_per_pack, share=self._shares, whole=self.whole_rows)
        if self.layout is BatchLayout.SINGLE_ROWS:
            return len(_flat(rows))
        return math.ceil(len(rows) / self.rows_per_batch)

    def idle(self, row: list[TokenPair]) -> Batch | Pack:
        """A batch that predicts nothing, for a rank that has no more rows but must take part in the collectives."""
        return without_predictions(row[0]) if self.packs else without_targets(pad(row[:1], self.pad_id))

    @property
    def _shares(self) -> bool:
        return self.layout is BatchLayout.SHARED_PREFIX


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes for one optimizer step."""

    step: int
    """Counted from 0."""
    batching: Batching
    batches: list[Batch | Pack]
    """At least one."""
    trained_tokens: int
    """Targets of the step over all ranks."""
    tokens: int
    """Tokens of the step over all ranks: every row's own, padding not counted."""

    def to(self, device: torch.device) -> StepBatches:
        """The same on `device`."""
        return replace(self, batches=[batch.to(device) for batch in self.batches])


class RankBatches:
    """Batches of this rank's share of some rows.

    Args:
        data: the rows.
        rank: of this process.
        world_size: number of processes.
        in_step: the model is sharded, so all ranks have to run equally many batches.
    """

    def __init__(self, data: TokenizedData, *, rank: int, world_size: int, in_step: bool = False) -> None:
        self.data = data
        self._rank = rank
        self._world_size = world_size
        self._in_step = in_step

    def of(self, rows: Array, batching: Batching) -> list[Batch | Pack]:
        """At least one batch; `rows` are those of all ranks."""
        mine = self._sequences(rows, self._rank)
        batches = batching.batches(mine) if mine else []
        wanted = 1
        if self._in_step:
            others = (rank for rank in range(self._world_size) if rank != self._rank)
            wanted = max([len(batches), *(batching.count(self._sequences(rows, rank)) for rank in others)])
        idle = batching.idle(self.data.sequences(int(rows[0]))) if len(batches) < wanted else None
        return batches + [idle] * (wanted - len(batches)) if idle is not None else batches

    def _sequences(self, rows: Array, rank: int) -> list[list[TokenPair]]:
        return [self.data.sequences(int(row)) for row in share_of_rank(rows, rank, self._world_size)]


class StepDataset(Dataset[StepBatches]):
    """Item i is optimizer step i of the plan, for one rank; `batching` may be changed between items."""

    def __init__(self, rows: RankBatches, plan: TrainingPlan, batching: Batching) -> None:
        self.rows = rows
        self.batching = batching
        self._plan = plan

    def __len__(self) -> int:
        return self._plan.total_steps

    def __getitem__(self, step: int) -> StepBatches:
        rows, data, batching = self._plan.rows_of_step(step), self.rows.data, self.batching
        return StepBatches(
            step,
            batching,
            self.rows.of(rows, batching),
            trained_tokens=int(data.row_trained_tokens[rows].sum()),
            tokens=int(data.row_tokens[rows].sum()),
        )

    def first_rows(self, count: int) -> list[list[TokenPair]]:
        """Up to `count` rows as the first epoch begins with them, the same on all ranks."""
        steps = range(min(len(self), math.ceil(count / self._plan.rows_per_step)))
        rows = np.concatenate([self._plan.rows_of_step(step) for step in steps])[:count]
        return [self.rows.data.sequences(int(row)) for row in rows]


def _flat(rows: Sequence[list[TokenPair]]) -> list[TokenPair]:
    return [sequence for row in rows for sequence in row]
