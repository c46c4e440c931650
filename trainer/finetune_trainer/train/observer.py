"""Tells what training does to those who want to know: the console, metrics.jsonl, the tracker and the operator.

Everything that is said about a running training goes through here, on global rank 0 only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune_trainer.train.choice import Choice
from finetune_trainer.train.console import Console
from finetune_trainer.train.metrics_log import MetricsLog, measured
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.progress_status import Phase, Progress, percent_done, remaining_seconds

LOGGED_STEPS = 200
"""About so many steps of a run are logged; short runs log every one."""


@dataclass(frozen=True)
class StepFigures:
    """What is known of a step before its device has computed it."""

    step: int
    """Counted from 1."""
    epoch: float
    """Passes over the data up to its end."""
    learning_rate: float
    tokens: int
    """Of all ranks' rows."""


class TrainingObserver:
    """Reports steps, evaluations and the pace; on other ranks than the first it says nothing.

    Args:
        reporter: to the operator.
        console: for people.
        metrics_log: the run's figures; None on other ranks.
        total_steps: optimizer steps of the run.
        track: sends figures of a step to an experiment tracker.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        reporter: ProgressReporter,
        console: Console,
        metrics_log: MetricsLog | None,
        total_steps: int,
        track: Callable[[Mapping[str, float], int], None] = lambda _values, _step: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reporter = reporter
        self._console = console
        self._metrics_log = metrics_log
        self._total_steps = total_steps
        self._every = max(1, total_steps // LOGGED_STEPS)
        self._track = track
        self._clock = clock
        self._first_step: int | None = None
        self._step = 0
        self._epoch = 0.0
        self._began_at: float | None = None
        self._step_began_at = 0.0
        self._seconds: list[float] = []
        """Of the steps since the last log; evaluations and saving do not count."""
        self._tokens = 0
        self._losses: list[float] = []
        self._figures: dict[str, float | None] = {}
        self._batching: str | None = None
        self._remaining: float | None = None
        """Seconds."""

    def batching_chosen(self, choice: Choice, step: int) -> None:
        """How rows become batches from optimizer step `step` on."""
        if (warning := choice.warning()) is not None:
            self._console.warning(warning)
        self._console.phase(choice.sentence())
        self._append(step, None, choice.figures())
        self._batching = choice.batching.layout.value

    def batches_halved(self, sentence: str) -> None:
        """Memory ran out, and it goes on in smaller parts."""
        self._console.warning(sentence)

    def begins(self, step: int, epoch: float) -> None:
        """The loop is about to start, after `step` steps of earlier attempts."""
        self._first_step, self._step, self._epoch = step, step, epoch
        self._report()

    def step_begins(self) -> None:
        """Its pace is measured from the first one on, an evaluation before it not included."""
        self._step_began_at = self._clock()
        if self._began_at is None:
            self._began_at = self._step_began_at

    def step_ends(self, figures: StepFigures, loss: float, grad_norm: float) -> None:
        """An optimizer step is done; loss per trained token, and the gradient's norm before it was clipped."""
        now = self._clock()
        self._seconds.append(now - self._step_began_at)
        self._tokens += figures.tokens
        self._losses.append(loss)
        self._step, self._epoch = figures.step, figures.epoch
        if self._first_step is not None and self._began_at is not None:
            self._remaining = remaining_seconds(
                first_step=self._first_step,
                step=figures.step,
                total_steps=self._total_steps,
                elapsed_seconds=now - self._began_at,
            )
        if figures.step % self._every == 0 or figures.step in (1, self._total_steps):
            self._log(figures, grad_norm)
        self._report()

    def evaluated(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Figures of one evaluation: eval_loss, eval_perplexity and eval_token_accuracy."""
        self._append(step, epoch, metrics)
        self._track(metrics, step)
        self._figures["eval_loss"] = measured(metrics["eval_loss"])
        self._report()
        self._console.evaluation(
            step,
            self._total_steps,
            loss=self._figures["eval_loss"],
            perplexity=measured(metrics.get("eval_perplexity")),
            token_accuracy=measured(metrics.get("eval_token_accuracy")),
        )

    def _log(self, figures: StepFigures, grad_norm: float) -> None:
        """The means of the steps since the last log."""
        busy = sum(self._seconds)
        values = {
            "loss": sum(self._losses) / len(self._losses),
            "learning_rate": figures.learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": self._tokens / busy if busy > 0 else None,
        }
        self._losses, self._seconds, self._tokens = [], [], 0
        self._append(figures.step, figures.epoch, values)
        self._track({name: value for name, value in values.items() if value is not None}, figures.step)
        self._figures |= {name: measured(value) for name, value in values.items()}
        self._console.step(
            figures.step,
            self._total_steps,
            loss=self._figures["loss"],
            learning_rate=self._figures["learning_rate"],
            tokens_per_second=self._figures["tokens_per_second"],
            remaining_seconds=self._remaining,
        )

    def _append(self, step: int, epoch: float | None, values: Mapping[str, object]) -> None:
        if self._metrics_log is not None:
            self._metrics_log.append(step, epoch=epoch, values=values)

    def _report(self) -> None:
        self._reporter.update(
            Progress(
                phase=Phase.RUNNING,
                percent=percent_done(self._step, self._total_steps),
                step=self._step,
                total_steps=self._total_steps,
                epoch=round(self._epoch, 4),
                batching=self._batching,
                loss=self._figures.get("loss"),
                eval_loss=self._figures.get("eval_loss"),
                learning_rate=self._figures.get("learning_rate"),
                tokens_per_second=self._figures.get("tokens_per_second"),
                remaining_seconds=self._remaining,
            )
        )
