"""A gradient that is no number: the run says at which step, and what it saved before can be gone on from."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import EXIT_CODES, Reason
from tests.trainer.faults.fault_points import SAVED, STEPS
from tests.trainer.faults.faulty_worker import NAN
from tests.trainer.faults.outputs import check_equal, finite_checkpoints, tiny_job, undisturbed
from tests.trainer.forked_job import ForkedJob

CASES = [(processes, step, valid) for processes in (1, 2) for step in (1, 6, 8, STEPS) for valid in (True, False)]
PLAYED = CASES if os.environ.get("FAULTS") == "all" else [(1, 8, True)]


@pytest.mark.parametrize(("processes", "step", "validated"), PLAYED)
def test_a_gradient_that_is_no_number_ends_the_run_and_spoils_nothing(
    tmp_path: Path, processes: int, step: int, validated: bool
) -> None:
    spec: dict[str, Any] = {} if validated else {"valid_path": None}
    job = tiny_job(tmp_path, processes=processes, **spec)
    attempt = ForkedJob(job, processes=processes, environ={NAN: str(step)})
    assert attempt.end() == EXIT_CODES[Reason.LOSS_DIVERGED], attempt.log()
    message = attempt.message()
    assert message is not None
    assert message.reason is Reason.LOSS_DIVERGED
    named = re.search(r"\bstep (\d+)", message.message or "")
    # An update that was spoilt shows in the loss of the step after it.
    assert named, message
    assert int(named[1]) in (step, step + 1)
    saved = [number for number in SAVED if number < step]
    assert finite_checkpoints(job)[-1:] == saved[-1:]
    assert not (job.output / "adapter" / "manifest.json").exists()
    again = ForkedJob(job, processes=processes)
    assert again.end() == 0, again.log()
    check_equal(job, undisturbed(processes, validated=validated))
