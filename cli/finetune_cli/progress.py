"""From the reports that the trainer posts to what the progress bar shows: an endpoint on loopback, and pure text."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from finetune_api.outcome import ProgressMetric, TrainerStatus
from finetune_operator.progress.app import progress_app
from finetune_operator.serving.thread import listening_in_thread
from finetune_trainer.train.console import human_duration


@dataclass(frozen=True)
class BarState:
    """What the bar shows."""

    phase: str
    completed: int
    total: int | None
    """None while it is unknown; the bar then only moves."""
    details: str


def bar_state(status: TrainerStatus) -> BarState:
    """What to show for one report: steps while it trains, percent of the phase otherwise."""
    phase = status.text(ProgressMetric.PHASE) or "Running"
    step, total = status.number(ProgressMetric.STEP), status.number(ProgressMetric.TOTAL_STEPS)
    if phase == "Running" and step is not None and total:
        return BarState(phase, int(step), int(total), _details(status, f"step {int(step)}/{int(total)}"))
    percent = status.progress_percentage
    if phase == "Publishing" or not percent:
        return BarState(phase, 0, None, "")
    return BarState(phase, percent, 100, f"{percent} %")


def _details(status: TrainerStatus, step: str) -> str:
    loss, eval_loss = status.number(ProgressMetric.LOSS), status.number(ProgressMetric.EVAL_LOSS)
    speed, left = status.number(ProgressMetric.TOKENS_PER_SECOND), status.estimated_remaining_seconds
    parts = [
        step,
        None if loss is None else f"loss {loss:.3f}",
        None if eval_loss is None else f"eval {eval_loss:.3f}",
        None if speed is None else f"{speed:,.0f} tokens/s",
        None if left is None else f"{human_duration(left)} left",
    ]
    return "  ".join(part for part in parts if part)


@contextmanager
def progress_endpoint(token: str, deliver: Callable[[TrainerStatus], None]) -> Iterator[str]:
    """Serves on loopback, in a thread, for as long as the block runs; yields the URL to post to.

    Args:
        token: the bearer token that reports must carry.
        deliver: called with each report, from the server's thread.
    """

    async def authorize(given: str) -> str | None:
        return "run" if hmac.compare_digest(given.encode(), token.encode()) else None

    app = progress_app(authorize, lambda _key, status: deliver(status))
    with ExitStack() as stack:
        try:
            port = stack.enter_context(listening_in_thread(app, "127.0.0.1", 0))
        except OSError as error:
            raise OSError("No port on 127.0.0.1 could be opened for the progress reports.") from error
        yield f"http://127.0.0.1:{port}/progress"
