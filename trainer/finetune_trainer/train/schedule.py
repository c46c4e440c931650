"""The learning rate of each optimizer step, and how often the model is saved where the job does not say.

Pure functions of the plan's size, so a resumed run goes on at the same rates. transformers' schedules begin at a rate
of 0: a run of one step would train nothing, and one as long as its warm-up next to nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from finetune_api.job import FineTuneJobSpec
from finetune_api.training import DEFAULT_SAVES, DEFAULT_WARMUP_STEPS
from finetune_trainer.train.plan import TrainingPlan, save_steps


@dataclass(frozen=True)
class Schedule:
    """How the learning rate rises and falls."""

    kind: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    """Fewer than the run has steps."""
    total_steps: int

    def share(self, step: int) -> float:
        """Share of the highest learning rate in optimizer step `step`, counted from 0; above 0 in every step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = max(0.0, (self.total_steps - step) / (self.total_steps - self.warmup_steps))
        if self.kind == "constant":
            return 1.0
        return left if self.kind == "linear" else math.sin(0.5 * math.pi * left) ** 2


def make_schedule(spec: FineTuneJobSpec, total_steps: int) -> tuple[Schedule, list[str]]:
    """The schedule of a job, and what its author should know about it.

    Without num_warmup_steps the warm-up takes a tenth of a short run; one that is asked for always leaves a step at
    the full rate.
    """
    kind, asked = spec.lr_scheduler_type, spec.num_warmup_steps
    if asked is None:
        return Schedule(kind, min(DEFAULT_WARMUP_STEPS, total_steps // 10), total_steps), []
    if asked < total_steps:
        return Schedule(kind, asked, total_steps), []
    notice = (
        f"num_warmup_steps is {asked}, but the run has only {total_steps} steps: the learning rate rises over "
        f"{total_steps - 1} of them instead. Lower it, or leave it out: it is then a tenth of a short run."
    )
    return Schedule(kind, total_steps - 1, total_steps), [notice]


def steps_to_save(spec: FineTuneJobSpec, plan: TrainingPlan) -> frozenset[int]:
    """Steps (counted from 1) after which the model is evaluated and saved.

    Without a frequency it is every epoch, or where there are many of them every second, third, ...: where one step is
    an epoch, each would be an evaluation and an upload.
    """
    frequency = spec.checkpoint_and_evaluation_frequency
    if frequency is None:
        every = math.ceil(plan.epochs / DEFAULT_SAVES) * plan.steps_per_epoch
    else:
        every = frequency.value * (plan.steps_per_epoch if frequency.strategy == "epochs" else 1)
    return save_steps(total_steps=plan.total_steps, every=every, at_most=spec.max_num_checkpoints)
