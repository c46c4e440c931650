"""Learning rates: no step trains with none, whatever the run's length; and saves that nobody asked for are few."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.train.plan import TrainingPlan
from finetune_trainer.train.schedule import Schedule, make_schedule, steps_to_save
from tests.trainer.run.tiny_job import TinyJob

Kind = Literal["cosine", "linear", "constant"]
KINDS: list[Kind] = ["cosine", "linear", "constant"]


def schedule_of(folder: Path, total_steps: int, **spec: Any) -> tuple[Schedule, list[str]]:
    job = TinyJob(folder, **spec)
    job.spec = {key: value for key, value in job.spec.items() if value is not None}
    return make_schedule(job.job().spec, total_steps)


@given(st.data(), st.integers(1, 3000), st.sampled_from(KINDS))
def test_every_step_has_a_rate_and_one_has_the_full_rate(data: st.DataObject, total: int, kind: Kind) -> None:
    schedule = Schedule(kind, data.draw(st.integers(0, total - 1)), total)
    shares = [schedule.share(step) for step in range(total)]
    assert min(shares) > 0
    assert max(shares) == 1
    rising, falling = shares[: schedule.warmup_steps], shares[schedule.warmup_steps :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_rate_rises_over_the_warm_up_and_then_falls(kind: Kind, shares: list[float]) -> None:
    schedule = Schedule(kind, 2, 6)
    assert [schedule.share(step) for step in range(6)] == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize(
    ("total", "warmup"), [(1, 0), (2, 0), (9, 0), (10, 1), (20, 2), (99, 9), (100, 10), (5000, 10)]
)
def test_a_short_run_has_a_short_warm_up_by_default(tmp_path: Path, total: int, warmup: int) -> None:
    schedule, notices = schedule_of(tmp_path, total, num_warmup_steps=None)
    assert (schedule.warmup_steps, notices) == (warmup, [])


@pytest.mark.parametrize(
    ("asked", "total", "warmup", "notices"), [(0, 1, 0, 0), (3, 4, 3, 0), (4, 4, 3, 1), (10, 1, 0, 1)]
)
def test_a_warm_up_as_long_as_the_run_is_capped_and_said_with_the_numbers(
    tmp_path: Path, asked: int, total: int, warmup: int, notices: int
) -> None:
    schedule, told = schedule_of(tmp_path, total, num_warmup_steps=asked)
    assert schedule.warmup_steps == warmup
    assert len(told) == notices
    assert all(f"{asked}, but the run has only {total} steps" in sentence for sentence in told)


@pytest.mark.parametrize(
    ("spec", "steps_per_epoch", "epochs", "saved"),
    [
        ({}, 3, 4, {3, 6, 9, 12}),
        ({}, 1, 100, set(range(5, 101, 5))),
        ({}, 2, 21, {*range(4, 42, 4), 42}),
        ({"max_num_checkpoints": 2}, 1, 100, {50, 100}),
        ({"checkpoint_and_evaluation_frequency": {"value": 1}}, 1, 100, set(range(1, 101))),
        ({"checkpoint_every_n_epochs": 10}, 1, 100, set(range(10, 101, 10))),
        ({"checkpoint_and_evaluation_frequency": {"strategy": "steps", "value": 30}}, 1, 100, {30, 60, 90, 100}),
    ],
)
def test_a_job_that_does_not_say_how_often_is_saved_each_epoch_but_seldom_where_epochs_are_short(
    tmp_path: Path, spec: dict[str, Any], steps_per_epoch: int, epochs: int, saved: set[int]
) -> None:
    job = TinyJob(tmp_path)
    del job.spec["checkpoint_and_evaluation_frequency"]
    job.spec |= spec
    plan = TrainingPlan(rows=4 * steps_per_epoch, rows_per_step=4, epochs=epochs, seed=0)
    assert steps_to_save(job.job().spec, plan) == saved
