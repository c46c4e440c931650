"""A real Trainer's events reach the console, metrics.jsonl and the progress report."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from finetune_api.outcome import BatchLayout
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.callbacks import TrainingObserver
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.console import Console
from finetune_trainer.train.gate import Verdict
from finetune_trainer.train.metrics_log import MetricsLog
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.progress_status import Progress


class Recorder(ProgressReporter):
    """Keeps what it is told instead of posting it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.told: list[Progress] = []

    def update(self, progress: Progress) -> None:
        self.told.append(progress)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([float(index), 1.0]), "labels": torch.tensor(0.0)}


class Squares(torch.nn.Module):
    """The smallest thing that Trainer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(2, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight(input_ids).squeeze(-1) - labels).square().mean()}


class Observed:
    """An observer with everything it writes to, under a clock that ticks one second per look."""

    def __init__(self, folder: Path) -> None:
        self.stream = io.StringIO()
        self.reporter = Recorder()
        self.metrics_log = MetricsLog(folder / "metrics.jsonl", resumed_at_step=None)
        self._seconds = 0.0
        self.observer = TrainingObserver(
            reporter=self.reporter, console=Console(self.stream), metrics_log=self.metrics_log, clock=self._tick
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


def train(observed: Observed, folder: Path) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        include_num_input_tokens_seen="all",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=Squares(), args=args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[observed.observer]
    )
    # Its own printed copy of every log.
    trainer.remove_callback(next(one for one in trainer.callback_handler.callbacks if "Printer" in type(one).__name__))
    trainer.train()


def test_every_step_and_evaluation_of_a_run_is_told_everywhere(observed: Observed, tmp_path: Path) -> None:
    train(observed, tmp_path / "run")

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
    # Two rows of two tokens in a step that took one tick of the clock.
    assert first["tokens_per_second"] == 4.0

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
    assert told[-1].loss == pytest.approx(observed.lines()[4]["loss"])
    assert told[-1].eval_loss == pytest.approx(observed.lines()[5]["eval_loss"])


def test_after_a_resume_the_time_left_follows_from_the_steps_of_this_attempt(
    observed: Observed, tmp_path: Path
) -> None:
    args, control = TrainingArguments(output_dir=str(tmp_path), report_to=[]), TrainerControl()
    state = TrainerState(global_step=90, max_steps=100)
    observed.observer.on_train_begin(args, state, control)
    observed.observer.on_step_begin(args, state, control)
    state.global_step = 91
    observed.observer.on_step_end(args, state, control)
    first, last = observed.reporter.told
    assert (first.step, first.percent, first.remaining_seconds) == (90, 90, None)
    # One step took two looks at the clock, nine are left.
    assert last.remaining_seconds == 18.0


def test_a_loss_that_is_not_a_number_is_shown_as_missing(observed: Observed, tmp_path: Path) -> None:
    args, control = TrainingArguments(output_dir=str(tmp_path), report_to=[]), TrainerControl()
    state = TrainerState(global_step=1, max_steps=2, epoch=0.5)
    observed.observer.on_log(args, state, control, logs={"loss": float("nan"), "learning_rate": 1e-4})
    observed.observer.on_evaluate(args, state, control, metrics={"eval_loss": float("inf")})
    assert [line.get("loss", line.get("eval_loss")) for line in observed.lines()] == [None, None]
    assert observed.reporter.told[-1].loss is None
    assert observed.stream.getvalue().splitlines() == [
        "step 1/2  lr 1.0e-04",
        "evaluation at step 1/2  loss not measured",
    ]


def test_other_ranks_say_nothing(observed: Observed, tmp_path: Path) -> None:
    args, control = TrainingArguments(output_dir=str(tmp_path), report_to=[]), TrainerControl()
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=False)
    observed.observer.on_train_begin(args, state, control)
    observed.observer.on_step_begin(args, state, control)
    observed.observer.on_step_end(args, state, control)
    observed.observer.on_log(args, state, control, logs={"loss": 1.0})
    observed.observer.on_evaluate(args, state, control, metrics={"eval_loss": 1.0})
    assert (observed.lines(), observed.reporter.told, observed.stream.getvalue()) == ([], [], "")


@pytest.mark.parametrize("refused", ["", "it has conv layers"])
def test_how_rows_are_laid_out_is_told_everywhere(observed: Observed, refused: str) -> None:
    layout = BatchLayout.PADDED if refused else BatchLayout.SHARED_PREFIX
    batching = Batching(layout, tokens_per_pack=4096, rows_per_batch=2, pad_id=0)
    figures: dict[str, Any] = {} if refused else {"loss_difference": 1e-7, "gradient_difference": 2e-6}
    observed.observer.batching_chosen(Choice(batching, True, Verdict(layout, refused=refused, **figures)), 3)
    (line,) = observed.lines()
    assert (line["step"], line["batching"], line["activation_checkpointing"]) == (3, layout.value, True)
    assert line["tokens_per_pack"] == (None if refused else 4096)
    assert line["gate_gradient_difference"] == (None if refused else 2e-6)
    told = observed.stream.getvalue()
    warning = "warning: For this model rows are padded: it has conv layers."
    assert (warning in told) == bool(refused)
    assert ("in packs of at most 4,096 tokens" in told) == (not refused)
    observed.observer.on_step_end(TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())
    assert observed.reporter.told[-1].batching == layout.value
