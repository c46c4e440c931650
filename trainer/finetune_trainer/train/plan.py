"""Which rows each optimizer step trains on, decided before the first one.

The plan is a pure function of (rows, sizes, seed), so a resumed run continues in it at any step, every rank computes
the same one, and the count of trained tokens per step is known without asking the other ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from finetune_api.training import DEFAULT_TOKENS_PER_STEP, MOST_DEFAULT_ROWS

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TrainingPlan:
    """The order of rows over all epochs."""

    rows: int
    """Rows of the data set."""
    rows_per_step: int
    """Rows per optimizer step over all ranks and accumulation; the last step of an epoch may have fewer."""
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return math.ceil(self.rows / self.rows_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def rows_of_step(self, step: int) -> Array:
        """Row numbers, int64 [at most rows_per_step], of optimizer step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.rows, self.seed, epoch)
        return order[within * self.rows_per_step : (within + 1) * self.rows_per_step]

    def epoch_after(self, steps: int) -> float:
        """Passes over the data after `steps` optimizer steps."""
        return steps / self.steps_per_epoch


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> Array:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def make_plan(
    *, rows: int, rows_per_step: int, num_epochs: int | None, min_update_steps: int, seed: int
) -> TrainingPlan:
    """The plan of a job; without `num_epochs`, as many epochs as it takes to reach `min_update_steps`."""
    steps_per_epoch = math.ceil(rows / rows_per_step)
    epochs = num_epochs if num_epochs is not None else math.ceil(min_update_steps / steps_per_epoch)
    return TrainingPlan(rows, rows_per_step, epochs, seed)


def default_batch_size(tokens: int, rows: int) -> int:
    """Rows per device and step of a job that does not say: the power of two that comes nearest to the tokens it should.

    Args:
        tokens: of all training rows.
        rows: how many these are, at least 1.
    """
    wanted = DEFAULT_TOKENS_PER_STEP * rows / max(tokens, 1)
    return int(2 ** min(max(round(math.log2(wanted)), 0), int(math.log2(MOST_DEFAULT_ROWS))))


def save_steps(*, total_steps: int, every: int, at_most: int | None) -> frozenset[int]:
    """Steps (counted from 1) after which the model is evaluated and saved; the last one always is.

    Args:
        total_steps: optimizer steps of the run.
        every: steps between two saves.
        at_most: bound on the number of saves; they are then spread evenly.
    """
    if at_most is not None:
        every = max(every, math.ceil(total_steps / at_most))
    return frozenset([*range(every, total_steps + 1, every), total_steps])
