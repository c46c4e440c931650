"""Ranks that are slow, hang or live in another time, while the others go on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_api.outcome import EXIT_CODES, Reason
from tests.trainer.faults.faulty_worker import TIMEOUT, Fault
from tests.trainer.faults.outputs import check_equal, tiny_job, undisturbed
from tests.trainer.forked_job import ForkedJob

ALL_FAULTS = os.environ.get("FAULTS") == "all"

_TIMEOUT_SECONDS = 5.0
_SLOW = ("before the adapter's manifest", "fetching the data", "tokenizing", "fetching the model", "merging")
"""What the first rank may take its time for."""


@pytest.mark.parametrize("point", _SLOW if ALL_FAULTS else _SLOW[:1])
def test_the_first_rank_may_work_for_longer_than_a_collective_may_take(tmp_path: Path, point: str) -> None:
    merged = point == "merging"
    job = tiny_job(tmp_path, processes=2, merged=merged)
    slow = Fault(point, action="slow", seconds=_TIMEOUT_SECONDS + 2)
    attempt = ForkedJob(job, processes=2, fault=slow, environ={TIMEOUT: str(_TIMEOUT_SECONDS)})
    assert attempt.end() == 0, attempt.log()
    assert attempt.fault_happened
    check_equal(job, undisturbed(2, merged=merged))


@pytest.mark.parametrize("point", ["step 6", "evaluating"] if ALL_FAULTS else ["step 6"])
def test_a_rank_that_hangs_is_given_up_and_the_run_can_go_on(tmp_path: Path, point: str) -> None:
    job = tiny_job(tmp_path, processes=2)
    hangs = Fault(point, rank=1, action="hang", victims=(1,))
    environ = {TIMEOUT: str(_TIMEOUT_SECONDS), "FINETUNE_GRACE_SECONDS": "3"}
    attempt = ForkedJob(job, processes=2, fault=hangs, environ=environ)
    assert attempt.end() == EXIT_CODES[Reason.PEER_FAILED], attempt.log()
    message = attempt.message()
    assert message is not None
    assert message.reason is Reason.PEER_FAILED
    again = ForkedJob(job, processes=2)
    assert again.end() == 0, again.log()
    check_equal(job, undisturbed(2))


@pytest.mark.parametrize("processes", [1, 2] if ALL_FAULTS else [1])
def test_a_clock_that_goes_back_an_hour_changes_nothing(tmp_path: Path, processes: int) -> None:
    job = tiny_job(tmp_path, processes=processes)
    attempt = ForkedJob(job, processes=processes, fault=Fault("step 6", action="back"))
    assert attempt.end() == 0, attempt.log()
    assert attempt.fault_happened
    remaining = attempt.remaining_seconds()
    assert remaining
    assert all(0 <= seconds < 600 for seconds in remaining)
    check_equal(job, undisturbed(processes))
