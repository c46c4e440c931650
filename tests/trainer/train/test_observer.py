"""Steps and evaluations reach the console, metrics.jsonl, the tracker and the progress report."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import BatchLayout
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.console import Console
from finetune_trainer.train.gate import Verdict
from finetune_trainer.train.metrics_log import MetricsLog
from finetune_trainer.train.observer import StepFigures, TrainingObserver
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.progress_status import Progress


class Recorder(ProgressReporter):
    """Keeps what it is told instead of posting it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.told: list[Progress] = []

    def update(self, progress: Progress) -> None:
        self.told.append(progress)


class Observed:
    """An observer with everything it writes to, under a clock that ticks one second per look."""

    def __init__(self, folder: Path, total_steps: int = 4) -> None:
        self.stream = io.StringIO()
        self.tracked: list[tuple[int, list[str]]] = []
        self.reporter = Recorder()
        self.metrics_log = MetricsLog(folder / "metrics.jsonl", resumed_at_step=None)
        self._seconds = 0.0
        self.observer = TrainingObserver(
            reporter=self.reporter,
            console=Console(self.stream),
            metrics_log=self.metrics_log,
            total_steps=total_steps,
            track=lambda values, step: self.tracked.append((step, sorted(values))),
            clock=self._tick,
        )

    def _tick(self) -> float:
        self._seconds += 1
        return self._seconds

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics_log.path.read_text().splitlines()]


@pytest.fixture
def observed(tmp_path: Path) -> Iterator[Observed]:
    everything = Observed(tmp_path)
    yield everything
    everything.metrics_log.close()


def steps(observed: Observed, first: int, last: int, *, evaluated: bool = True) -> None:
    """The steps from `first` to `last` of a run of two epochs; every second one is evaluated."""
    for step in range(first, last + 1):
        observed.observer.step_begins()
        observed.observer.step_ends(StepFigures(step, step / 2, 1e-4, tokens=4), 2.0 / step, 1.5)
        if evaluated and step % 2 == 0:
            observed.observer.evaluated(step, step / 2, {"eval_loss": 1.0 / step, "eval_perplexity": 2.0})


def test_every_step_and_evaluation_of_a_run_is_told_everywhere(observed: Observed) -> None:
    observed.observer.begins(0, 0.0)
    steps(observed, 1, 4)
    kinds = [(line["step"], "loss" in line, "eval_loss" in line) for line in observed.lines()]
    assert kinds == [
        (1, True, False),
        (2, True, False),
        (2, False, True),
        (3, True, False),
        (4, True, False),
        (4, False, True),
    ]
    first = observed.lines()[0]
    assert {"step", "epoch", "time", "loss", "learning_rate", "grad_norm", "tokens_per_second"} == set(first)
    # Four tokens in a step that took one tick of the clock.
    assert first["tokens_per_second"] == 4.0
    figures = ["grad_norm", "learning_rate", "loss", "tokens_per_second"]
    evaluated = ["eval_loss", "eval_perplexity"]
    assert observed.tracked == [(1, figures), (2, figures), (2, evaluated), (3, figures), (4, figures), (4, evaluated)]

    console = observed.stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in console] == [
        "step 1/4",
        "step 2/4",
        "evaluation at step 2/4",
        "step 3/4",
        "step 4/4",
        "evaluation at step 4/4",
    ]

    told = observed.reporter.told
    assert [told[0].step, told[0].percent, told[0].remaining_seconds] == [0, 0, None]
    assert told[-1].step == 4
    assert told[-1].percent == 99
    assert told[-1].loss == pytest.approx(0.5)
    assert told[-1].eval_loss == pytest.approx(0.25)


def test_a_long_run_is_logged_about_two_hundred_times_with_means_of_the_steps_between(tmp_path: Path) -> None:
    observed = Observed(tmp_path, total_steps=1001)
    steps(observed, 1, 1001, evaluated=False)
    logged = {line["step"]: line for line in observed.lines()}
    assert list(logged) == [1, *range(5, 1001, 5), 1001]
    assert logged[10]["loss"] == pytest.approx(sum(2.0 / step for step in range(6, 11)) / 5)
    assert logged[10]["tokens_per_second"] == 4.0
    assert len(observed.reporter.told) == 1001
    observed.metrics_log.close()


def test_after_a_resume_the_time_left_follows_from_the_steps_of_this_attempt(tmp_path: Path) -> None:
    observed = Observed(tmp_path, total_steps=100)
    observed.observer.begins(90, 0.9)
    steps(observed, 91, 91)
    first, last = observed.reporter.told
    assert (first.step, first.percent, first.remaining_seconds) == (90, 90, None)
    # One step took one tick of the clock, nine are left.
    assert last.remaining_seconds == 9.0
    observed.metrics_log.close()


def test_a_figure_that_is_not_a_number_is_shown_as_missing(observed: Observed) -> None:
    observed.observer.step_begins()
    observed.observer.step_ends(StepFigures(1, 0.5, 1e-4, tokens=4), 1.0, float("nan"))
    observed.observer.evaluated(1, 0.5, {"eval_loss": 1.0, "eval_perplexity": float("inf")})
    assert [line.get("grad_norm", line.get("eval_perplexity")) for line in observed.lines()] == [None, None]
    assert observed.stream.getvalue().splitlines()[1] == "evaluation at step 1/4  loss 1.000"


def test_other_ranks_write_no_figures() -> None:
    observer = TrainingObserver(
        reporter=ProgressReporter(None), console=Console(io.StringIO()), metrics_log=None, total_steps=2
    )
    observer.begins(0, 0.0)
    observer.step_begins()
    observer.step_ends(StepFigures(1, 0.5, 1e-4, tokens=4), 1.0, 1.0)
    observer.evaluated(1, 0.5, {"eval_loss": 1.0})


@pytest.mark.parametrize("refused", ["", "it has conv layers"])
def test_how_rows_are_laid_out_is_told_everywhere(observed: Observed, refused: str) -> None:
    layout = BatchLayout.PADDED if refused else BatchLayout.SHARED_PREFIX
    batching = Batching(layout, tokens_per_pack=4096, rows_per_batch=2, pad_id=0)
    figures: dict[str, Any] = {} if refused else {"loss_difference": 1e-7, "gradient_difference": 2e-6}
    observed.observer.batching_chosen(Choice(batching, 1, Verdict(layout, refused=refused, **figures)), 3)
    (line,) = observed.lines()
    assert (line["step"], line["batching"], line["activation_checkpointing"]) == (3, layout.value, True)
    assert line["tokens_per_pack"] == (None if refused else 4096)
    assert line["gate_gradient_difference"] == (None if refused else 2e-6)
    told = observed.stream.getvalue()
    warning = "warning: For this model rows are padded: it has conv layers."
    assert (warning in told) == bool(refused)
    assert ("in packs of at most 4,096 tokens" in told) == (not refused)
    observed.observer.begins(0, 0.0)
    assert observed.reporter.told[-1].batching == layout.value
