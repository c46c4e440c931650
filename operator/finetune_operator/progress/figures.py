"""Turns a trainer's report into the progress that status shows: pure, and whatever the sender writes, it never fails.

A figure that is not a number, not finite or out of the schema's bounds is left out: an update of status that the API
server refuses would cost every other figure as well, and a 0 in its place would be a lie.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from finetune_api.outcome import BatchLayout, Metric, ProgressMetric, TrainerStatus
from finetune_api.status import Phase, Progress

CLOCK_TOLERANCE = timedelta(minutes=10)
"""How far a sender's clock may be from ours before our time of receipt counts instead."""

LARGEST_NUMBER = 2**53
"""Bound of whole numbers in status."""

EPOCH_LOGGED = "epoch"
TOKENS_PER_SECOND_LOGGED = "train_tokens_per_second"
"""Names in the logs of transformers' Trainer, which its KubeflowCallback sends under the names they have there."""

KNOWN = frozenset({*ProgressMetric, EPOCH_LOGGED, TOKENS_PER_SECOND_LOGGED})
LAYOUTS = {layout.value: layout for layout in BatchLayout}
PHASES = {phase.value: phase for phase in (Phase.PREPARING, Phase.RUNNING, Phase.PUBLISHING)}


def sent_at(status: TrainerStatus, received: datetime) -> datetime:
    """When a report was sent, to tell which of two of one sender is the newer (UTC).

    Not after it was received, whatever the sender's clock says, and not more than CLOCK_TOLERANCE before: within these
    bounds a clock that is wrong, or is put right, keeps no later report from counting.
    """
    sent = _time(status.last_updated_time)
    return received if sent is None else max(received - CLOCK_TOLERANCE, min(received, sent))


def condensed(status: TrainerStatus, received: datetime) -> TrainerStatus:
    """`status` without what `progress_of` does not look at, with a time that can be believed (UTC)."""
    metrics: dict[str, Metric] = {}
    for metric in status.metrics:
        if metric.name in KNOWN:
            metrics.setdefault(metric.name, metric)
    sent = _time(status.last_updated_time)
    at = received if sent is None or not received - CLOCK_TOLERANCE <= sent <= received else sent
    return status.model_copy(update={"metrics": list(metrics.values()), "last_updated_time": _text(at)})


def progress_of(status: TrainerStatus) -> tuple[Progress, Phase | None]:
    """The progress in `status` and the phase that it is in; None when it names one that a trainer cannot be in.

    Without a name it is Running: KubeflowCallback, which knows no phases, only reports while it trains.
    """
    sent = _time(status.last_updated_time)
    step, total_steps = _whole(status, ProgressMetric.STEP), _whole(status, ProgressMetric.TOTAL_STEPS) or None
    if step is not None and total_steps is not None and step > total_steps:  # one of them is wrong
        step = total_steps = None
    progress = Progress(
        percent=status.progress_percentage,
        step=step,
        total_steps=total_steps,
        epoch=_positive(status, ProgressMetric.EPOCH, EPOCH_LOGGED),
        loss=status.number(ProgressMetric.LOSS),
        eval_loss=status.number(ProgressMetric.EVAL_LOSS),
        learning_rate=_positive(status, ProgressMetric.LEARNING_RATE),
        tokens_per_second=_positive(status, ProgressMetric.TOKENS_PER_SECOND, TOKENS_PER_SECOND_LOGGED),
        batching=LAYOUTS.get(status.text(ProgressMetric.BATCHING) or ""),
        eta_seconds=_in_bounds(status.estimated_remaining_seconds),
        last_updated=None if sent is None else _text(sent),
    )
    phase = status.text(ProgressMetric.PHASE)
    return progress, Phase.RUNNING if phase is None else PHASES.get(phase)


def _whole(status: TrainerStatus, name: str) -> int | None:
    value = status.number(name)
    return _in_bounds(int(value)) if value is not None and value.is_integer() else None


def _in_bounds(value: int | None) -> int | None:
    return value if value is not None and 0 <= value <= LARGEST_NUMBER else None


def _positive(status: TrainerStatus, *names: str) -> float | None:
    """The first of `names` that is there and not negative."""
    values = (status.number(name) for name in names)
    return next((value for value in values if value is not None and value >= 0), None)


def _time(text: str) -> datetime | None:
    """RFC 3339 with an offset, as UTC."""
    try:
        time = datetime.fromisoformat(text)
        return None if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _text(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")
