"""Rows of an optimizer step -> what one rank runs through the model for it.

Which rows a step has is the plan's alone; how they are laid out changes no mathematics, only time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune_api.outcome import BatchLayout
from finetune_trainer.data.dataset import TokenizedData
from finetune_trainer.model.batch import Batch, TokenPair, pad, without_targets
from finetune_trainer.model.packing import pack_count, packs_of, prefixed_packs_of, without_predictions
from finetune_trainer.model.prefix_tree import AnyBatch, Pack, PrefixedPacks
from finetune_trainer.train.dealing import deal
from finetune_trainer.train.plan import Array


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
    prefixes: bool = False
    """What rows of several packs begin with is computed once for all of them."""
    prefix_cost: float = 1.0
    """Of how many tokens of a pack a token of a prefix takes the memory."""
    whole_rows: bool = False
    """Some layers compute each row of a pack whole, so the bound of a pack counts what rows share once for each."""

    @property
    def packs(self) -> bool:
        """Whether batches are packs."""
        return self.layout in (BatchLayout.SHARED_PREFIX, BatchLayout.PACKED)

    def halved(self, largest: int) -> Batching:
        """Batches of half the size; `largest` is the most tokens that one had so far."""
        if self.packs:
            # It may be far below what is allowed.
            return replace(self, tokens_per_pack=min(self.tokens_per_pack, largest) // 2)
        return replace(self, rows_per_batch=max(1, self.rows_per_batch // 2))

    def bound(self) -> str:
        """How large a batch may be, for a sentence."""
        if self.packs:
            return f"packs of at most {self.tokens_per_pack:,} tokens"
        return f"{self.rows_per_batch} rows at a time"

    def batches(self, rows: Sequence[list[TokenPair]]) -> list[AnyBatch]:
        """Batches of one or more rows, largest first, so that memory runs out early if it does."""
        if self.prefixes and self._shares:
            return [*prefixed_packs_of(_flat(rows), budget=self.tokens_per_pack, cost=self.prefix_cost)]
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

    def of(self, rows: Array, batching: Batching) -> list[AnyBatch]:
        """At least one batch; `rows` are those of all ranks."""
        ranks = deal(self.data.row_tokens[rows], self._world_size)
        mine = self._sequences(rows[ranks == self._rank])
        batches = batching.batches(mine) if mine else []
        wanted = 1
        if self._in_step:
            others = (rank for rank in range(self._world_size) if rank != self._rank)
            wanted = max([len(batches), *(batching.count(self._sequences(rows[ranks == rank])) for rank in others)])
        idle = batching.idle(self.data.sequences(int(rows[0]))) if len(batches) < wanted else None
        return batches + [idle] * (wanted - len(batches)) if idle is not None else batches

    def _sequences(self, rows: Array) -> list[list[TokenPair]]:
        return [self.data.sequences(int(row)) for row in rows]


def is_single_row(batch: AnyBatch) -> bool:
    """Whether a batch cannot be made smaller."""
    if isinstance(batch, PrefixedPacks):
        return False
    return batch.tokens == batch.longest if isinstance(batch, Pack) else len(batch.input_ids) == 1


def tokens_of(batch: AnyBatch) -> int:
    """Tokens that are in memory at a time, padding too."""
    return batch.input_ids.numel() if isinstance(batch, Batch) else batch.tokens


def computed_of(batch: AnyBatch) -> int:
    """Tokens that are computed, padding too."""
    return batch.computed if isinstance(batch, PrefixedPacks) else tokens_of(batch)


def _flat(rows: Sequence[list[TokenPair]]) -> list[TokenPair]:
    return [sequence for row in rows for sequence in row]
