"""What the benchmark measures as ours is what a job does."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from typing_extensions import override

from benchmarks.trainer.contestants import Ours
from benchmarks.trainer.job import BenchmarkJob
from finetune_trainer.train.console import Console
from finetune_trainer.train.loop import train
from finetune_trainer.train.observer import StepFigures, TrainingObserver
from finetune_trainer.train.progress import ProgressReporter
from tests.trainer.run.tiny_job import rows, tiny_model

STEPS = 3


class Recorder(TrainingObserver):
    """Keeps loss and gradient norm of each step."""

    def __init__(self) -> None:
        super().__init__(
            reporter=ProgressReporter(None), console=Console(io.StringIO()), metrics_log=None, total_steps=STEPS
        )
        self.found: list[tuple[float, float]] = []

    @override
    def step_ends(self, figures: StepFigures, loss: float, grad_norm: float) -> None:
        self.found.append((loss, grad_norm))


def test_a_step_of_our_contestant_is_a_step_of_the_training_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    job = BenchmarkJob(tiny_model(), rows(8 * STEPS), rows_per_step=8, folder=tmp_path, seed=0)
    observer, model = Recorder(), job.load()
    train(job.loop(model, observer))
    ours = Ours("ours", job)
    ours.prepare()

    steps = [ours.step(number) for number in range(STEPS)]

    assert [(step.loss, step.gradient_norm) for step in steps] == observer.found
    for trained, other in zip(ours.trainable.values(), model.trained, strict=True):
        torch.testing.assert_close(trained, other, rtol=0, atol=0)
