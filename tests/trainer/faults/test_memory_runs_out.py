"""Memory that runs out once, in any step and in evaluations, on the last rank: the same training in smaller parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.trainer.faults.fault_points import FORWARDS
from tests.trainer.faults.faulty_worker import Fault
from tests.trainer.faults.outputs import check_equal, tiny_job, undisturbed
from tests.trainer.forked_job import ForkedJob

EVALUATIONS = ("evaluating", "evaluating at the end")
CASES = [(processes, point) for processes in (1, 2) for point in (*FORWARDS, *EVALUATIONS)]
PLAYED = CASES if os.environ.get("FAULTS") == "all" else [(2, "the forward pass of step 6")]


@pytest.mark.parametrize(("processes", "point"), PLAYED)
def test_a_run_that_is_short_of_memory_once_ends_like_one_that_never_was(
    tmp_path: Path, processes: int, point: str
) -> None:
    job = tiny_job(tmp_path, processes=processes, lora_config={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    attempt = ForkedJob(job, processes=processes, fault=Fault(point, rank=processes - 1, action="memory"))
    assert attempt.end() == 0, attempt.log()
    assert attempt.fault_happened
    check_equal(job, undisturbed(processes, dropout=0.0))
