"""Loss, perplexity and accuracy over all validation rows; each rank computes its share and waits for nobody."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from finetune_trainer.ahead import ahead
from finetune_trainer.errors import JobError
from finetune_trainer.launch.failures import out_of_memory
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.prefix_tree import AnyBatch
from finetune_trainer.train.batching import Batching, RankBatches, is_single_row, tokens_of
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.plan import Array
from finetune_trainer.train.steps import free_memory

_BATCHES = 16
"""Batches of rows that are packed together: enough to share beginnings, few enough to hold."""


class Evaluation:
    """Evaluates one model on one set of rows.

    Args:
        model: in training mode, and left so.
        rows: this rank's share of the validation rows.
        rows_per_batch: of padded batches; None for as many as in training, however few these are by then.
        ranks: this process among the others.
        told: takes a sentence when memory runs out.
    """

    def __init__(
        self,
        model: AdaptedModel,
        rows: RankBatches,
        rows_per_batch: int | None,
        ranks: Ranks,
        told: Callable[[str], None],
    ) -> None:
        self._model = model
        self._rows = rows
        self._rows_per_batch = rows_per_batch
        self._ranks = ranks
        self._told = told
        self._most: Batching | None = None
        """What fits, once memory has run out."""

    def run(self, batching: Batching) -> dict[str, float]:
        """eval_loss per trained token, eval_perplexity and eval_token_accuracy; none need be a number.

        Args:
            batching: as in training.

        Raises:
            JobError: OutOfMemory, a single row does not fit.
        """
        data = self._rows.data
        batching = replace(batching, rows_per_batch=self._rows_per_batch or batching.rows_per_batch, length=None)
        together = batching.rows_per_batch * _BATCHES * self._ranks.world_size
        rows = np.arange(len(data))
        groups = [rows[first : first + together] for first in range(0, len(rows), together)]
        sums = torch.zeros(2, dtype=torch.float64, device=self._model.device)
        self._model.peft.eval()
        with torch.no_grad():
            for group, used, batches in ahead(self._laid_out(groups, batching)):
                sums += self._sums(group, used, batches)
        self._model.peft.train()
        loss, correct = self._ranks.sums(sums.tolist())
        count = int(data.row_trained_tokens.sum())
        mean = loss / count
        # exp overflows above 709; a perplexity that large has no meaning.
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {"eval_loss": mean, "eval_perplexity": perplexity, "eval_token_accuracy": correct / count}

    def _laid_out(self, groups: list[Array], batching: Batching) -> Iterator[tuple[Array, Batching, list[AnyBatch]]]:
        """Each group with its batches and how they were made, in `batching` or what is known to fit by then."""
        for group in groups:
            used = self._most or batching
            yield group, used, self._rows.of(group, used)

    def _sums(self, group: Array, batching: Batching, batches: list[AnyBatch]) -> torch.Tensor:
        """float64 [2]: loss and correct targets of this rank's batches of `group`, in smaller ones if need be."""
        try:
            parts = [torch.stack([part.double() for part in self._model.loss(batch)]) for batch in batches]
            return torch.stack(parts).sum(0)
        except (RuntimeError, MemoryError) as error:
            self._check_smaller(error, batches)
        free_memory(self._model.device)
        # Batches that were made ahead may be larger than what is known by now to be too large.
        if self._most is None or self._most == batching:
            self._most = batching.halved(max(tokens_of(batch) for batch in batches))
            self._told(f"Memory ran out in an evaluation: it goes on with {self._most.bound()}.")
        return self._sums(group, self._most, self._rows.of(group, self._most))

    def _check_smaller(self, error: Exception, batches: list[Any]) -> None:
        """Go on only where memory ran out, smaller batches are possible and nobody waits for these."""
        trouble = out_of_memory(error, self._ranks.rank)
        if trouble is None:
            raise error
        if self._model.sharded or all(is_single_row(batch) for batch in batches):
            raise JobError(*trouble) from error
