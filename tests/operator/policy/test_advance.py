"""No job burns machines for ever: attempts that get nowhere are bounded, whatever ends them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.outcome import Reason
from finetune_api.status import Attempt, Checkpoint, ConditionType, FineTuneJobStatus, Progress
from finetune_operator.policy.advance import MOST_ATTEMPTS_WITHOUT_PROGRESS, is_stuck, note_checkpoint, note_report
from finetune_operator.policy.conditions import condition, is_finished
from finetune_operator.policy.decide import attempt_is_open, decide, holds_back, note_created
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.plan import DesiredState, ObservedState
from tests.operator.policy.views import (
    NOW,
    PATIENCE,
    checkpoint,
    desired,
    ended,
    failure,
    later,
    pytorch_job,
    running,
)

LIMIT = MOST_ATTEMPTS_WITHOUT_PROGRESS
BACKOFF_LIMIT = 2


@dataclass
class Job:
    """A job in a world where every attempt ends as it is told to."""

    status: FineTuneJobStatus = field(default_factory=FineTuneJobStatus)
    desired: DesiredState = field(default_factory=lambda: desired(backoff_limit=BACKOFF_LIMIT))
    now: datetime = NOW

    def look(self, found: PyTorchJobView | None = None, pods: tuple[PodView, ...] = (), **more: Any) -> None:
        """The operator looks at it, and is restarted: status is all that it keeps."""
        observed = ObservedState(desired=self.desired, status=self.status, pytorch_job=found, pods=pods, **more)
        plan = decide(observed, self.now, PATIENCE)
        if plan.create is not None:
            note_created(plan, pytorch_job(plan.create, created_at=self.now), observed, self.now, PATIENCE)
        self.status = FineTuneJobStatus.model_validate(plan.status.model_dump(by_alias=True))

    def begin(self) -> bool:
        """The next attempt is made, once its time has come; whether there is one."""
        for _ in range(5):
            if attempt_is_open(self.status) or is_finished(self.status):
                break
            self.look()
            self.now += timedelta(seconds=400)
        return attempt_is_open(self.status)

    def end(self, how: str, step: int) -> None:
        """The attempt ends; where it saves something, at that step."""
        found = pytorch_job(self.status.attempt or 0, created_at=self.now)
        said = failure(Reason.TERMINATED, checkpoint=checkpoint(step))
        if how == "preempted by Kueue":
            self.look(replace(found, suspended=True), (ended(0, 143, failure(Reason.TERMINATED)),))
            self.look(replace(found, resumed_at=self.now), (running(),))
        elif how == "deleted":
            self.look()
        elif how == "evicted":
            self.look(found, (ended(0, None, disruption="Evicted: low on memory"),))
        elif how == "stopped with a checkpoint":
            self.look(found, (ended(0, 143, said),))
        elif how == "its pod was deleted and said so late":
            self.look(found, (running(deleting=True),))
            self.look(None, (ended(0, 143, said, deleting=True),))
        elif how == "killed, having begun at a checkpoint":
            self.look(found, (running(),), progress=Progress(step=step))
            self.look(found, (running(),), progress=Progress(step=step + 1000))
            self.look(found, (ended(0, None, disruption="NodeLost"),))
        elif how == "suspended and resumed":
            self.desired = replace(self.desired, suspend=True)
            self.look(found, (running(),))
            self.look()
            self.desired = replace(self.desired, suspend=False)
        elif how == "the Hub was away":
            self.look(found, (ended(0, 201, failure(Reason.HUB_UNAVAILABLE)),))
        elif how == "a peer was missed":
            two = replace(found, nodes=2, end="Failed")
            self.look(two, (ended(0, 203, failure(Reason.PEER_FAILED, collateral=True)),))


GETS_FURTHER = (
    "stopped with a checkpoint",
    "its pod was deleted and said so late",
    "killed, having begun at a checkpoint",
)
ENDS = (*GETS_FURTHER, "preempted by Kueue", "deleted", "evicted", "suspended and resumed")
COUNTED = ("the Hub was away",)
UNCOUNTED = ("deleted", "evicted", "a peer was missed")


@given(
    st.lists(
        st.tuples(st.sampled_from([*ENDS, *COUNTED, *UNCOUNTED]), st.integers(0, 5)),
        max_size=4 * (LIMIT + BACKOFF_LIMIT),
    )
)
def test_attempts_after_the_last_progress_are_bounded(ends: list[tuple[str, int]]) -> None:
    job, newest, idle = Job(), 0, 0
    for how, step in [*ends, *[("evicted", 0)] * (LIMIT + 1)]:
        if not job.begin():
            break
        before = job.status.attempts_without_progress or 0
        job.end(how, step)
        if how in GETS_FURTHER and step > newest:
            newest, idle = step, 0
        if how == "suspended and resumed":
            idle = 0
        idle += how not in ("suspended and resumed", "preempted by Kueue")
        assert idle <= LIMIT + BACKOFF_LIMIT + 1
        assert (job.status.attempts_without_progress or 0) <= before + 1
    assert is_finished(job.status)
    assert not job.begin()


@pytest.mark.parametrize("how", UNCOUNTED)
def test_ten_attempts_in_a_row_that_get_nowhere_are_the_last(how: str) -> None:
    job = Job()
    for number in range(1, LIMIT + 1):
        assert job.begin(), number
        job.end(how, 0)
        assert job.status.attempts_without_progress == number
    assert not job.begin()
    end = condition(job.status, ConditionType.SUCCEEDED)
    assert end is not None
    assert (end.status, end.reason) == ("False", "NoProgress")
    assert end.message.startswith("10 attempts in a row were taken away before training got any further; the last one")
    assert job.status.attempts[-1].message is not None
    assert job.status.attempts[-1].message in end.message
    assert "checkpoint_and_evaluation_frequency" in end.message
    assert job.status.failures is None


@pytest.mark.parametrize("how", [*GETS_FURTHER, "suspended and resumed"])
def test_whoever_gets_further_or_is_looked_after_goes_on(how: str) -> None:
    job = Job()
    for step in range(1, 4):
        for _ in range(LIMIT - 2):
            assert job.begin()
            job.end("evicted", 0)
        assert job.begin()
        job.end(how, step)
        assert (job.status.attempts_without_progress or 0) <= 1
    assert job.begin()


def test_a_checkpoint_that_is_known_after_the_tenth_end_counts() -> None:
    """The pod says what it saved while the end of the attempt is written down already."""
    job = Job()
    for number in range(1, LIMIT + 1):
        assert job.begin(), number
        job.end("evicted" if number < LIMIT else "its pod was deleted and said so late", 7)
    assert job.begin()


def test_kueues_preemption_counts_for_nothing() -> None:
    job = Job()
    assert job.begin()
    for _ in range(3 * LIMIT):
        job.end("preempted by Kueue", 0)
    assert (job.status.attempt, job.status.attempts_without_progress, job.status.attempts) == (1, None, [])


def test_a_suspension_between_two_attempts_counts_as_one() -> None:
    job = Job()
    for _ in range(LIMIT):
        assert job.begin()
        job.end("evicted", 0)
    job.desired = replace(job.desired, suspend=True)
    job.look()
    assert job.status.attempts_without_progress is None
    job.desired = replace(job.desired, suspend=False)
    assert job.begin()


SAVED = Checkpoint(uri="s3://models/step-5", step=5)


@pytest.mark.parametrize(
    ("status", "step", "left"),
    [
        ({}, 0, 3),
        ({}, 1, None),
        ({"checkpoint": SAVED}, 5, 3),
        ({"checkpoint": SAVED}, 6, None),
        ({"resumed_step": 5}, 5, 3),
        ({"resumed_step": 5}, 6, None),
        ({"resumed_step": 2, "checkpoint": SAVED}, 4, 3),
    ],
)
def test_only_a_newer_step_is_progress(status: dict[str, Any], step: int, left: int | None) -> None:
    found = FineTuneJobStatus(attempts_without_progress=3, **status)
    note_checkpoint(found, step)
    assert found.attempts_without_progress == left
    reported = FineTuneJobStatus(attempts_without_progress=3, **status)
    note_report(reported, Progress(step=step))
    assert reported.attempts_without_progress == left
    assert reported.resumed_step == (max(step, status.get("resumed_step", 0)) or None)


def test_only_the_first_step_of_an_attempt_tells_where_it_began() -> None:
    status = FineTuneJobStatus(attempts_without_progress=3, progress=Progress(step=0))
    note_report(status, Progress(step=500))
    assert (status.attempts_without_progress, status.resumed_step) == (3, None)
    status.progress = Progress(percent=3)
    note_report(status, Progress(percent=4))
    assert status.resumed_step is None
    note_report(status, Progress(step=500))
    assert status.resumed_step == 500
    assert status == FineTuneJobStatus(resumed_step=500, progress=Progress(percent=3))


@pytest.mark.parametrize(("count", "stuck"), [(None, False), (LIMIT - 1, False), (LIMIT, True), (LIMIT + 1, True)])
def test_the_bound(count: int | None, stuck: bool) -> None:
    assert is_stuck(FineTuneJobStatus(attempts_without_progress=count)) is stuck


@pytest.mark.parametrize(
    ("status", "spec", "holds"),
    [
        ({}, {}, False),
        ({}, {"suspend": True}, True),
        ({}, {"problems": ["bad"]}, True),
        ({"failures": 3}, {"backoff_limit": 3}, False),
        ({}, {"backoff_limit": 0}, False),
        ({"active_since": "2026-01-31T11:59:00Z"}, {"active_deadline_seconds": 61}, False),
        ({"active_since": "2026-01-31T11:59:00Z"}, {"active_deadline_seconds": 60}, True),
        # The limit was lowered after an attempt had been made that nobody wrote down.
        ({"failures": 3}, {"backoff_limit": 2}, True),
        ({"attempts_without_progress": LIMIT - 1}, {}, False),
        ({"attempts_without_progress": LIMIT}, {}, True),
        ({"active_seconds": 59}, {"active_deadline_seconds": 60}, False),
        ({"active_seconds": 60}, {"active_deadline_seconds": 60}, True),
        # It only has to wait for its time.
        ({"attempts": [Attempt(number=1, reason="Disrupted", completion_time="2026-01-31T12:00:00Z")]}, {}, False),
    ],
)
def test_what_holds_the_next_attempt_back(status: dict[str, Any], spec: dict[str, Any], holds: bool) -> None:
    found = FineTuneJobStatus(**status)
    assert holds_back(desired(**spec), found, later(0)) is holds
    if found.active_since is None:
        plan = decide(ObservedState(desired=desired(**spec), status=found), later(10), PATIENCE)
        assert (plan.create is None) is holds
        assert plan.again_at == (later(10) if is_finished(plan.status) else None)
