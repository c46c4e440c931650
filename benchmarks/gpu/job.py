"""The job that is measured: benchmarks/trainer's, on any device, its rows dealt out as the measurement wants them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from typing_extensions import override

from benchmarks.trainer.job import BenchmarkJob
from benchmarks.trainer.shapes import Row
from finetune_trainer.train.plan import Array, TrainingPlan


@dataclass(frozen=True)
class RepeatedPlan(TrainingPlan):
    """A plan some of whose steps come again, so that two layouts are given the same rows."""

    order: tuple[int, ...]
    """The step of the plan whose rows each step has."""

    @property
    @override
    def total_steps(self) -> int:
        return len(self.order)

    @override
    def rows_of_step(self, step: int) -> Array:
        return super().rows_of_step(self.order[step])


class GpuJob(BenchmarkJob):
    """A job with its data tokenized and its plan made.

    Args:
        model: folder of the base model.
        rows: the training data.
        rows_per_step: a multiple of 8.
        order: see `RepeatedPlan`.
        folder: an empty folder for the job's files.
        seed: of the order of rows and of the LoRA weights.
        device: what is trained on.
    """

    def __init__(
        self,
        model: Path,
        rows: list[Row],
        *,
        rows_per_step: int,
        order: tuple[int, ...],
        folder: Path,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(model, rows, rows_per_step=rows_per_step, folder=folder, seed=seed)
        self._device = device
        plan = self.prepared.plan
        repeated = RepeatedPlan(plan.rows, plan.rows_per_step, plan.epochs, plan.seed, order)
        self.prepared = replace(self.prepared, plan=repeated)
