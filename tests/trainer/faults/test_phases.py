"""A run that is killed or stopped, whatever it is doing, and started again ends like one that was left alone.

Meanwhile nothing half is taken for whole. FAULTS=all runs the whole table, otherwise a sample.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_api.outcome import EXIT_CODES, Reason
from finetune_trainer.storage.manifest import MANIFEST_NAME
from tests.trainer.faults.fault_points import EVERYWHERE, POINTS, PREPARING, PUBLISHING
from tests.trainer.faults.faulty_worker import LAUNCHER, Fault
from tests.trainer.faults.outputs import check_equal, check_whole, tiny_job, undisturbed
from tests.trainer.forked_job import ForkedJob
from tests.trainer.run.tiny_job import TinyJob

ALL_FAULTS = os.environ.get("FAULTS") == "all"

SAMPLE = {(1, "uploading a checkpoint", (LAUNCHER,)), (2, "removing a checkpoint", (1,))}
"""Kills that are made always."""
STOPPED_SAMPLE = {(1, "step 6"), (2, "loading the model")}
"""Stops that are made always."""

_STOPPED_SECONDS = 30.0
"""A pod is killed so long after it was told to end."""


def _merged(point: str) -> bool:
    return "merging" in point


def _kills() -> list[tuple[int, str, Fault]]:
    found = []
    for point in POINTS:
        found += [(1, point, Fault(point, victims=who)) for who in ((LAUNCHER,), (0,))]
        found += [(2, point, Fault(point, victims=who)) for who in ((LAUNCHER,), (0,), (1,))]
        if point in EVERYWHERE:
            found += [(2, point, Fault(point, rank=1, victims=(1,)))]
    return [case for case in found if ALL_FAULTS or (case[0], case[1], case[2].victims) in SAMPLE]


def _name(value: object) -> str:
    if isinstance(value, Fault):
        victims = "and".join(str(victim) for victim in value.victims)
        return f"{victims} killed" + (" itself" if value.rank else "")
    return str(value)


def _again(job: TinyJob, processes: int) -> None:
    """Another attempt, which is to end as the first would have ended."""
    again = ForkedJob(job, processes=processes)
    assert again.end(meanwhile=lambda: check_whole(job.output)) == 0, again.log()
    message = again.message()
    assert message is not None
    assert message.succeeded
    assert message.adapter is not None


@pytest.mark.parametrize(("processes", "point", "fault"), _kills(), ids=_name)
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path, processes: int, point: str, fault: Fault) -> None:
    job = tiny_job(tmp_path, processes=processes, merged=_merged(point))
    killed = ForkedJob(job, processes=processes, fault=fault)
    code = killed.end()
    assert killed.fault_happened, killed.log()
    check_whole(job.output)
    message = killed.message()
    published = (job.output / "adapter" / MANIFEST_NAME).exists()
    if LAUNCHER in fault.victims:
        assert (code, message) == (-9, None)
    else:
        assert code == 128 + 9, killed.log()
        assert message is not None
        assert not message.succeeded
        assert f"Rank {fault.victims[0]} was ended by SIGKILL" in (message.message or "")
    if 0 in fault.victims or LAUNCHER in fault.victims:
        assert published == (point in PUBLISHING[PUBLISHING.index("after the adapter's manifest") :])
    else:
        # The first rank may finish what it has begun.
        assert not published or point in PUBLISHING
    _again(job, processes)
    check_equal(job, undisturbed(processes, merged=_merged(point)))


def _stops() -> list[tuple[int, str]]:
    return [
        (processes, point)
        for processes in (1, 2)
        for point in POINTS
        if ALL_FAULTS or (processes, point) in STOPPED_SAMPLE
    ]


@pytest.mark.parametrize(("processes", "point"), _stops())
def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path: Path, processes: int, point: str) -> None:
    job = tiny_job(tmp_path, processes=processes, merged=_merged(point))
    stopped = ForkedJob(job, processes=processes, fault=Fault(point, action="stop"))
    code = stopped.end(meanwhile=lambda: check_whole(job.output))
    assert stopped.fault_happened, stopped.log()
    assert stopped.seconds_since_fault < _STOPPED_SECONDS
    message = stopped.message()
    assert message is not None
    if point in PUBLISHING or "last" in point or "end" in point:
        # Nothing is left to be trained, so there is nothing to stop; the end may be nearer than that of its time.
        assert (code == 0) == message.succeeded
    else:
        assert (code, message.reason) == (EXIT_CODES[Reason.TERMINATED], Reason.TERMINATED), stopped.log()
        assert message.checkpoint is not None or point in PREPARING
    if message.checkpoint is not None:
        assert (Path(message.checkpoint.uri) / MANIFEST_NAME).exists()
    _again(job, processes)
    check_equal(job, undisturbed(processes, merged=_merged(point)))
