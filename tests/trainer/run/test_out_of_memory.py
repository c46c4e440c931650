"""A step that runs out of memory is made again in smaller parts: the same training, and it says so once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import EXIT_CODES, Reason
from tests.trainer.forked_job import ForkedJob, run_to_end
from tests.trainer.run.short_of_memory import TOKENS
from tests.trainer.run.tiny_job import TinyJob

# Dropout, so that a step that is made again must draw the same.
JOB: dict[str, Any] = {"lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}}
WORKER = "tests.trainer.run.short_of_memory"


def run_with(tokens: int, folder: Path, *, processes: int, **spec: Any) -> ForkedJob:
    return ForkedJob(TinyJob(folder, **spec), processes=processes, worker=WORKER, environ={TOKENS: str(tokens)})


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_that_does_not_fit_goes_on_in_halves(tmp_path: Path, processes: int) -> None:
    spec = JOB | {"train_batch_size_per_device": 12 // processes}
    undisturbed = run_to_end(tmp_path / "undisturbed", processes=processes, **spec)
    short = run_with(300 // processes, tmp_path / "short", processes=processes, **spec)
    assert short.end() == 0, short.log()
    assert short.log().count("Memory ran out at step 1: it goes on with packs of at most") == 1
    assert short.job.losses() == pytest.approx(undisturbed.job.losses(), rel=1e-5)
    assert short.job.eval_losses() == pytest.approx(undisturbed.job.eval_losses(), rel=1e-5)


def test_processes_that_share_the_model_take_smaller_packs_in_the_next_attempt(tmp_path: Path) -> None:
    spec = JOB | {"train_batch_size_per_device": 6, "sharding": "fsdp"}
    undisturbed = run_to_end(tmp_path / "undisturbed", processes=2, **spec)
    first = run_with(150, tmp_path / "short", processes=2, **spec)
    assert first.end() == EXIT_CODES[Reason.PACKS_TOO_LARGE], first.log()
    message = first.message()
    assert message is not None
    assert message.reason is Reason.PACKS_TOO_LARGE
    assert "Rank 1 ran out of memory at step 1" in (message.message or "")
    second = run_with(150, tmp_path / "short", processes=2, **spec)
    assert second.end() == 0, second.log()
    assert second.job.losses() == pytest.approx(undisturbed.job.losses(), rel=1e-5)


def test_padded_rows_are_halved_too(tmp_path: Path) -> None:
    spec = JOB | {"padding": "max_length", "context_length": 80}
    undisturbed = run_to_end(tmp_path / "undisturbed", processes=1, **spec)
    short = run_with(100, tmp_path / "short", processes=1, **spec)
    assert short.end() == 0, short.log()
    assert "it goes on with 2 rows at a time" in short.log()
    assert "it goes on with 1 rows at a time" in short.log()
    assert short.job.losses() == pytest.approx(undisturbed.job.losses(), rel=1e-5)


def test_where_one_row_does_not_fit_it_checkpoints_and_then_gives_up(tmp_path: Path) -> None:
    spec = JOB | {"padding": "max_length", "context_length": 80, "train_batch_size_per_device": 1}
    short = run_with(70, tmp_path / "short", processes=1, **spec)
    assert short.end() == EXIT_CODES[Reason.OUT_OF_MEMORY], short.log()
    assert "it goes on with activations computed again in the backward pass" in short.log()
    message = short.message()
    assert message is not None
    assert message.reason is Reason.OUT_OF_MEMORY
    assert "lower context_length" in (message.message or "")
