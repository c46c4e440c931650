"""What an attempt is shown to do while its pods run: the trainer's word, or the likeliest while there is none."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.status import FineTuneJobStatus, Phase, Progress
from finetune_operator.policy.decide import decide
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.phase import TRAINERS_PHASES, reports_count_since, shown_phase
from finetune_operator.policy.plan import ObservedState
from finetune_operator.policy.times import moment, rfc3339
from tests.operator.policy.views import NOW, PATIENCE, desired, later, pod, pytorch_job, running

AN_HOUR = 3600


def shown(
    began: float | None = -10,
    reported: Phase | None = None,
    last: Phase | None = Phase.STARTING,
    heard: float | None = None,
    *,
    active: float | None = -1000,
    expected: bool = True,
) -> tuple[Phase, datetime | None]:
    """The phase, and when it becomes another; times in seconds from NOW."""
    status = FineTuneJobStatus(phase=last, active_since=rfc3339(later(active)) if active is not None else None)
    if heard is not None:
        status.progress = Progress(last_updated=rfc3339(later(heard)))
    pods = [running(1, started_at=later(-999)), running(0, started_at=later(began) if began is not None else None)]
    return shown_phase(status, pods, reported, reports_expected=expected, now=NOW)


PREPARING, RUNNING, PUBLISHING = TRAINERS_PHASES


@pytest.mark.parametrize("reported", TRAINERS_PHASES)
@pytest.mark.parametrize("last", [None, *TRAINERS_PHASES, Phase.QUEUED])
@pytest.mark.parametrize("expected", [True, False])
def test_a_report_is_believed(reported: Phase, last: Phase | None, expected: bool) -> None:
    assert shown(reported=reported, last=last, expected=expected) == (reported, None)


@pytest.mark.parametrize(
    ("began", "shows"),
    [
        (0, (PREPARING, later(300))),
        (-10, (PREPARING, later(290))),
        (-299, (PREPARING, later(1))),
        (-300, (RUNNING, None)),
        (-900, (RUNNING, None)),
        # A clock that is wrong: counted from when the attempt became active, a thousand seconds ago.
        (AN_HOUR, (RUNNING, None)),
        (-AN_HOUR, (RUNNING, None)),
        (None, (RUNNING, None)),
    ],
)
@pytest.mark.parametrize("last", [Phase.STARTING, PREPARING])
def test_a_silent_trainer_prepares_for_a_while_from_when_its_container_began(
    began: float | None, shows: tuple[Phase, datetime | None], last: Phase
) -> None:
    """Not from when the attempt was made: queues and large images take longer than that."""
    assert shown(began, last=last) == shows


@pytest.mark.parametrize("began", [0, -10, -299, -900, AN_HOUR, -AN_HOUR, None])
def test_a_silent_trainer_that_runs_prepares_no_more_whoever_looks(began: float | None) -> None:
    """Two operators whose clocks differ would write one after the other for as long as they differ."""
    assert shown(began, last=RUNNING) == (RUNNING, None)


@pytest.mark.parametrize("clock", [-AN_HOUR, 0, AN_HOUR])
def test_a_node_with_another_clock_does_not_put_an_end_to_preparing(clock: float) -> None:
    assert shown(clock, active=-5) == (PREPARING, later(300 if clock == 0 else 295))
    assert shown(clock, active=None) == (PREPARING, later(300))


def test_where_nobody_reports_it_simply_runs() -> None:
    assert shown(expected=False) == (RUNNING, None)
    assert shown(last=PREPARING, expected=False) == (RUNNING, None)


@pytest.mark.parametrize("last", TRAINERS_PHASES)
@pytest.mark.parametrize("expected", [True, False])
def test_an_operator_that_has_just_started_leaves_what_it_was_told(last: Phase, expected: bool) -> None:
    assert shown(-900, last=last, heard=-5, expected=expected) == (last, None)
    assert shown(-900, last=last, heard=-900, expected=expected) == (last, None)
    assert shown(None, last=last, heard=-5, expected=expected) == (last, None)


def test_what_was_heard_before_the_container_began_is_of_another_run() -> None:
    """Kueue let the attempt go on in new pods."""
    assert shown(-10, last=PUBLISHING, heard=-11) == (PREPARING, later(290))
    assert shown(-400, last=PUBLISHING, heard=-401) == (RUNNING, None)


def test_what_it_waits_for_is_no_word_of_the_trainers() -> None:
    assert shown(-10, last=Phase.STARTING, heard=-5) == (PREPARING, later(290))
    assert shown(-900, last=Phase.QUEUED, heard=-5) == (RUNNING, None)


@given(
    st.one_of(st.none(), st.integers(-5000, 5000)),
    st.sampled_from([None, *Phase]),
    st.one_of(st.none(), st.integers(-5000, 5000)),
    st.one_of(st.none(), st.integers(-5000, 5000)),
)
def test_a_phase_that_passes_passes(
    began: int | None, last: Phase | None, heard: int | None, active: int | None
) -> None:
    phase, until = shown(began, None, last, heard, active=active)
    assert phase in TRAINERS_PHASES
    assert until is None or (phase is PREPARING and until > NOW)


def at_work(**more: Any) -> ObservedState:
    """A job whose pod runs, and of which nothing was heard."""
    since = rfc3339(later(-100))
    status = FineTuneJobStatus(attempt=1, attempt_start_time=since, active_since=since)
    pods = more.pop("pods", [running(started_at=later(-10))])
    return ObservedState(desired=desired(), status=status, pytorch_job=pytorch_job(), pods=pods, **more)


def test_a_timer_leads_out_of_preparing() -> None:
    plan = decide(at_work(reports_expected=True), NOW, PATIENCE)
    assert (plan.status.phase, plan.again_at) == (PREPARING, later(290))
    assert decide(at_work(reports_expected=True), later(290), PATIENCE).status.phase is RUNNING
    quiet = decide(at_work(), NOW, PATIENCE)
    assert (quiet.status.phase, quiet.again_at) == (RUNNING, None)


@pytest.mark.parametrize("pods", [[], [pod()], [pod(waiting="ErrImagePull")], [pod(unschedulable="full")]])
def test_before_all_pods_run_no_timer_of_the_phase_runs(pods: list[PodView]) -> None:
    plan = decide(at_work(reports_expected=True, pods=pods), NOW, PATIENCE)
    assert plan.again_at == (later(500) if plan.status.phase == "Starting" and pods == [pod()] else None)


RESUMED = pytorch_job(resumed_at=later(-60))


@pytest.mark.parametrize(
    ("received", "found", "active", "current"),
    [
        (-10, None, -60, False),
        (-7000, pytorch_job(), None, True),
        (-10, RESUMED, -60, True),
        (-60, RESUMED, -60, True),
        (-61, RESUMED, -60, False),
        # The operator has not noticed yet that it goes on.
        (-10, RESUMED, None, True),
        (-61, RESUMED, None, False),
        # Of pods that are on their way out.
        (0, pytorch_job(suspended=True), None, False),
        (0, pytorch_job(suspended=True, end="Succeeded"), None, True),
        # The training operator's clock is an hour off, ours is not.
        (-61, pytorch_job(resumed_at=later(-AN_HOUR)), -60, False),
        (-10, pytorch_job(resumed_at=later(AN_HOUR)), -60, True),
        (-61, pytorch_job(resumed_at=later(-AN_HOUR)), None, False),
        (0, pytorch_job(resumed_at=later(AN_HOUR)), None, True),
    ],
)
def test_a_report_is_of_the_run_that_goes_on_now(
    received: float, found: PyTorchJobView | None, active: float | None, current: bool
) -> None:
    status = FineTuneJobStatus(active_since=rfc3339(later(active)) if active is not None else None)
    assert moment(status.active_since) == (later(active) if active is not None else None)
    assert (later(received) >= reports_count_since(status, found, NOW)) is current
