"""How far a run is, and how that is put into a progress report: pure, so that nothing here can hold up a step."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from finetune_api.outcome import Metric, ProgressMetric, TrainerStatus
from finetune_trainer.train.metrics_log import measured


class Phase(StrEnum):
    """Which part of the run the percentage is about."""

    PREPARING = "Preparing"
    RUNNING = "Running"
    PUBLISHING = "Publishing"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the run is. What is None was not measured and is not sent."""

    phase: Phase
    percent: int | None = None
    """Share of the phase that is done, 0 to 100; see `percent_done`."""
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    remaining_seconds: float | None = None
    batching: str | None = None
    """How rows lie beside each other."""


def percent_done(done: int, total: int | None) -> int | None:
    """Whole percent of `done` in `total`, at most 99: only the end of the run is 100. None when `total` is unknown."""
    if not total or total < 0:
        return None
    return max(0, min(99, done * 100 // total))


def remaining_seconds(*, first_step: int, step: int, total_steps: int, elapsed_seconds: float) -> float | None:
    """Time left at the pace of this attempt's own steps, which began after `first_step` and took `elapsed_seconds`.

    None before the first own step is done: a resumed run knows nothing about its pace yet.
    """
    if step <= first_step or total_steps <= 0:
        return None
    return max(0, total_steps - step) * elapsed_seconds / (step - first_step)


def trainer_status(progress: Progress, now: datetime) -> TrainerStatus:
    """`progress` as it travels."""
    fields: dict[ProgressMetric, int | float | None] = {
        ProgressMetric.STEP: progress.step,
        ProgressMetric.TOTAL_STEPS: progress.total_steps,
        ProgressMetric.EPOCH: measured(progress.epoch),
        ProgressMetric.LOSS: measured(progress.loss),
        ProgressMetric.EVAL_LOSS: measured(progress.eval_loss),
        ProgressMetric.LEARNING_RATE: measured(progress.learning_rate),
        ProgressMetric.TOKENS_PER_SECOND: measured(progress.tokens_per_second),
    }
    metrics = [Metric(name=ProgressMetric.PHASE, value=progress.phase)]
    metrics += [Metric(name=name, value=_text(value)) for name, value in fields.items() if value is not None]
    if progress.batching is not None:
        metrics.append(Metric(name=ProgressMetric.BATCHING, value=progress.batching))
    remaining = measured(progress.remaining_seconds)
    return TrainerStatus(
        progress_percentage=progress.percent,
        estimated_remaining_seconds=None if remaining is None else max(0, round(remaining)),
        metrics=metrics,
        last_updated_time=now.isoformat(),
    )


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
