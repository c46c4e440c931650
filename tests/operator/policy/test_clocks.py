"""Back-off, deadline and TTL: when something happens, from what status holds alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from time import tzset
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.status import Attempt, ConditionType, FineTuneJobStatus
from finetune_operator.policy import deadline, retry, ttl
from finetune_operator.policy.conditions import condition, is_finished
from finetune_operator.policy.decide import decide, note_created
from finetune_operator.policy.observed import VerificationView
from finetune_operator.policy.times import after, believed, moment, pause_seconds, rfc3339, seconds_between
from finetune_operator.policy.waiting import waits_for
from tests.operator.policy.views import NOW, PATIENCE, ended, later, observed, pytorch_job, running, success

FAILED, SUSPENDED = "TrainerCrashed", "Suspended"


def attempts(*reasons: str) -> list[Attempt]:
    """Attempts that have ended one after another, the last one at NOW."""
    return [
        Attempt(number=number, reason=reason, completion_time=rfc3339(NOW)) for number, reason in enumerate(reasons, 1)
    ]


@pytest.mark.parametrize(
    ("reasons", "seconds"),
    [
        ([], None),
        ([FAILED], 10),
        ([FAILED] * 2, 20),
        ([FAILED] * 3, 40),
        ([FAILED] * 6, 320),
        ([FAILED] * 7, 360),
        ([FAILED] * 64, 360),
        (["Disrupted"] * 2, 20),
        ([SUSPENDED], 0),
        ([FAILED, FAILED, SUSPENDED], 0),
        ([FAILED, SUSPENDED, FAILED], 10),
    ],
)
def test_waits_double_since_the_last_suspension(reasons: Sequence[str], seconds: float | None) -> None:
    found = retry.next_attempt_at(attempts(*reasons), base_seconds=10, limit_seconds=360, now=NOW)
    assert found == (later(seconds) if seconds is not None else None)


@given(
    st.lists(st.sampled_from([FAILED, "Disrupted"]), max_size=100),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
)
def test_a_wait_never_shrinks_with_another_attempt_nor_exceeds_its_limit(
    reasons: list[str], base: float, limit: float
) -> None:
    waits = [
        retry.delay_seconds(attempts(*reasons[:count]), base_seconds=base, limit_seconds=limit)
        for count in range(len(reasons) + 1)
    ]
    assert waits == sorted(waits)
    assert max(waits) <= limit


@pytest.mark.parametrize(
    ("failures", "limit", "over"), [(None, 0, False), (0, 0, False), (1, 0, True), (3, 3, False), (4, 3, True)]
)
def test_the_limit_is_how_many_failures_are_repeated(failures: int | None, limit: int, over: bool) -> None:
    assert retry.exhausted(failures, limit) == over


@given(st.lists(st.tuples(st.booleans(), st.integers(-50, 100)), max_size=30))
def test_active_seconds_never_shrink_whatever_clocks_do(turns: list[tuple[bool, int]]) -> None:
    status, clock, before = FineTuneJobStatus(), 0, 0
    for active, seconds in turns:
        clock += seconds
        deadline.account(status, since=later(clock) if active else None, now=later(clock))
        assert (status.active_seconds or 0) >= before
        assert (status.active_since is not None) == active
        before = status.active_seconds or 0


def test_only_active_time_counts() -> None:
    status = FineTuneJobStatus()
    deadline.account(status, since=later(0), now=later(5))
    deadline.account(status, since=later(50), now=later(50))
    # A beginning that was written down this very second is none in the future.
    deadline.account(status, since=later(-5), now=later(0))
    assert deadline.deadline(status, 100) == later(100)
    deadline.account(status, since=None, now=later(60))
    assert deadline.deadline(status, 100) is None
    assert not deadline.exceeded(status, 100, later(10_000))
    deadline.account(status, since=later(20_000), now=later(20_000))
    assert deadline.deadline(status, 100) == later(20_040)
    assert not deadline.exceeded(status, 100, later(20_039))
    assert deadline.exceeded(status, 100, later(20_040))
    assert not deadline.exceeded(status, None, later(10**6))
    assert deadline.deadline(status, None) is None


@pytest.mark.parametrize(
    ("stopped", "active"),
    [
        (later(-18_000), 18_000),
        (later(-35_999), 1),
        (NOW, 36_000),
        # No such moment, or one by a wrong clock: until now.
        (None, 36_000),
        (later(1), 36_000),
        (later(-36_001), 36_000),
    ],
)
def test_what_a_queue_stopped_while_nobody_looked_was_active_until_then(stopped: datetime | None, active: int) -> None:
    status = FineTuneJobStatus(attempt=1, active_since=rfc3339(later(-36_000)))
    found = pytorch_job(suspended=True, suspended_at=stopped, queue="team")
    spec: dict[str, Any] = {"active_deadline_seconds": 36_000, "queue": "team"}
    plan = decide(observed(status, found, [], **spec), NOW, PATIENCE)
    if active < 36_000:
        assert (plan.status.phase, plan.status.active_seconds, plan.status.active_since) == ("Queued", active, None)
        assert decide(observed(plan.status, found, [], **spec), later(10**6), PATIENCE).status == plan.status
    else:
        assert plan.status.attempts[-1].reason == "DeadlineExceeded"
    goes_on = decide(observed(status, pytorch_job(), [running()], **spec), NOW, PATIENCE)
    assert goes_on.status.attempts[-1].reason == "DeadlineExceeded"


@pytest.mark.parametrize(
    ("resumed", "since"), [(-60, -60), (0, 0), (-36_000, -36_000), (-35_400, -36_000), (-35_399, -35_399), (1, -36_000)]
)
def test_a_suspension_that_nobody_saw_does_not_count_as_activity(resumed: float, since: float) -> None:
    status = FineTuneJobStatus(attempt=1, active_since=rfc3339(later(-36_000)))
    plan = decide(observed(status, pytorch_job(resumed_at=later(resumed)), [running()]), NOW, PATIENCE)
    assert moment(plan.status.active_since) == later(since)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 10**6))
def test_the_deadline_comes_when_it_says(active: int, limit: int, running: int) -> None:
    status = FineTuneJobStatus(active_seconds=active, active_since=rfc3339(NOW))
    due = deadline.deadline(status, limit)
    assert due is not None
    assert deadline.exceeded(status, limit, later(running)) == (later(running) >= due or active >= limit)


def test_a_ttl_counts_from_the_end() -> None:
    status = FineTuneJobStatus(completion_time=rfc3339(NOW))
    assert ttl.expiry(status, 60) == later(60)
    assert ttl.expiry(status, 0) == NOW
    assert ttl.expiry(status, None) is None
    assert ttl.expiry(FineTuneJobStatus(), 60) is None


@pytest.fixture(params=["UTC-9", "UTC+9"])
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine in another time zone."""
    monkeypatch.setenv("TZ", request.param)
    tzset()
    yield
    monkeypatch.undo()
    tzset()


@pytest.mark.usefixtures("elsewhere")
def test_no_time_depends_on_where_the_operator_runs() -> None:
    for text in ("0001-01-01T00:00:00Z", "2026-01-31T12:00:00Z", "9999-12-31T23:59:59Z"):
        found = moment(text)
        assert found is not None
        assert rfc3339(found) == text


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_time_survives_being_written(time: datetime) -> None:
    assert moment(rfc3339(time)) == time.replace(microsecond=0)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-01-31", "2026-01-31T12:00:00", "2026-13-01T00:00:00Z"])
def test_what_is_no_time_is_none(text: str) -> None:
    assert moment(text) is None


def test_time_between_two_machines_is_never_negative() -> None:
    assert seconds_between(later(5), NOW) == 0


@given(st.datetimes(timezones=st.just(UTC)), st.datetimes(timezones=st.just(UTC)), st.floats(1, 60))
def test_a_pause_grows_within_its_bounds_whatever_the_clocks_say(since: datetime, now: datetime, least: float) -> None:
    pause = pause_seconds(since, now, least=least)
    assert least <= pause <= 300
    assert pause_seconds(since, after(now, 60), least=least) >= pause or since > now


@pytest.mark.parametrize(
    ("since", "pause"), [(0, 5), (-50, 5), (-51, 5.1), (-2999, 299.9), (-3001, 300), (600, 5), (601, 300), (None, 300)]
)
def test_the_longer_something_lasts_the_more_seldom_it_is_looked_at(since: float | None, pause: float) -> None:
    begun = later(since) if since is not None else None
    assert pause_seconds(begun, NOW, least=5) == pytest.approx(pause)


@pytest.mark.parametrize(("foreign", "told"), [(None, -5), (-10, -5), (-9, -9), (0, 0), (1, -5)])
def test_another_clock_is_believed_where_it_can_be_right(foreign: float | None, told: float) -> None:
    time = later(foreign) if foreign is not None else None
    assert believed(time, earliest=later(-9), now=NOW, otherwise=later(-5)) == later(told)


LAST = datetime.max.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("start", "seconds", "end"), [(NOW, 5.5, later(5.5)), (NOW, -5, later(-5)), (NOW, 1e12, LAST), (LAST, 1, LAST)]
)
def test_no_time_is_too_late_to_be_told(start: datetime, seconds: float, end: datetime) -> None:
    assert after(start, seconds) == end


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_time_that_has_no_place_in_utc_is_none(text: str) -> None:
    assert moment(text) is None


AN_HOUR = 3600
CLOCKS = [-AN_HOUR, 0, AN_HOUR]
"""How far another machine's clock is ahead of ours (seconds)."""


@pytest.mark.parametrize(("clock", "due"), [(-AN_HOUR, later(10 - AN_HOUR)), (0, later(10)), (AN_HOUR, None)])
def test_an_end_by_another_clock_delays_no_attempt(clock: float, due: datetime | None) -> None:
    ended_then = [Attempt(number=1, reason=FAILED, completion_time=rfc3339(later(clock)))]
    assert retry.next_attempt_at(ended_then, base_seconds=10, limit_seconds=360, now=NOW) == due
    status = FineTuneJobStatus(attempt=1, attempts=ended_then)
    plan = decide(observed(status), NOW, PATIENCE)
    assert plan.create == (None if clock == 0 else 2)


@given(st.integers(-(10**6), 10**6), st.floats(0, 1e5), st.floats(0, 1e4))
def test_no_wait_goes_beyond_its_limit_whatever_the_clock(clock: int, base: float, limit: float) -> None:
    ends = [Attempt(number=1, reason=FAILED, completion_time=rfc3339(later(clock)))]
    due = retry.next_attempt_at(ends, base_seconds=base, limit_seconds=limit, now=NOW)
    assert due is None or due <= after(NOW, limit)


@pytest.mark.parametrize("clock", [*CLOCKS, -601, -1, 1])
def test_an_attempt_is_active_from_when_it_was_noticed(clock: float) -> None:
    """A minute that a clock is behind may be one in which nobody looked; an hour is no hour of training."""
    begun = later(clock) if clock == -1 else NOW
    for found, status in [
        (pytorch_job(created_at=later(clock)), FineTuneJobStatus(attempt=1)),
        (pytorch_job(created_at=later(-7200), resumed_at=later(clock)), FineTuneJobStatus(attempt=1, active_seconds=9)),
    ]:
        spec: dict[str, Any] = {"active_deadline_seconds": 100}
        plan = decide(observed(status, found, [], **spec), NOW, PATIENCE)
        assert moment(plan.status.active_since) == begun
        assert not is_finished(plan.status)
        # Pods are missed from then on, too.
        assert plan.again_at == after(begun, 30)
        early = decide(observed(plan.status, found, [], **spec), later(28), PATIENCE)
        assert waits_for(early.status) == "Starting"
        assert moment(early.status.active_since) == begun
        late = decide(observed(plan.status, found, [], **spec), later(30), PATIENCE)
        assert waits_for(late.status) == "PodsNotCreated"
        over = decide(observed(plan.status, found, [], **spec), after(begun, 100), PATIENCE)
        assert over.status.attempts[-1].reason == "DeadlineExceeded"


@pytest.mark.parametrize(("clock", "begun"), [*((clock, 0) for clock in CLOCKS), (-60, -60)])
def test_a_new_attempt_begins_when_it_is_written_down_or_just_before(clock: float, begun: float) -> None:
    plan = decide(observed(), NOW, PATIENCE)
    note_created(plan, pytorch_job(created_at=later(clock)), observed(), NOW, PATIENCE)
    assert moment(plan.status.attempt_start_time) == moment(plan.status.active_since) == later(begun)


@pytest.mark.parametrize("clock", CLOCKS)
def test_activity_that_began_in_the_future_begins_now(clock: float) -> None:
    status = FineTuneJobStatus(attempt=1, active_since=rfc3339(later(clock)))
    plan = decide(observed(status, pytorch_job(), [running()]), NOW, PATIENCE)
    assert moment(plan.status.active_since) == later(min(clock, 0))


@pytest.mark.parametrize(("clock", "release_at"), [(-AN_HOUR, 0), (0, 30), (AN_HOUR, 0), (None, 0)])
def test_what_outlives_the_trainer_is_let_go_in_time(clock: float | None, release_at: float) -> None:
    done = decide(observed(FineTuneJobStatus(attempt=1), pytorch_job(), [ended(0, 0, success())]), NOW, PATIENCE).status
    done.completion_time = rfc3339(later(clock)) if clock is not None else None
    left = [ended(0, 0, phase="Running")]
    plan = decide(observed(done, pytorch_job(), left), NOW, PATIENCE)
    assert plan.release is (release_at == 0)
    assert plan.again_at == (None if plan.release else later(release_at))
    assert decide(observed(done, pytorch_job(), left), later(release_at), PATIENCE).release


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_ttl_is_off_by_no_more_than_the_clock(clock: float) -> None:
    """To delete a job an hour late is no harm, and nobody can tell whether its end was an hour ago."""
    status = FineTuneJobStatus(completion_time=rfc3339(later(clock)))
    assert ttl.expiry(status, 60) == later(clock + 60)


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_jobs_clock_neither_shortens_nor_lengthens_a_verification(clock: float) -> None:
    done = decide(observed(FineTuneJobStatus(attempt=1), pytorch_job(), [ended(0, 0, success())]), NOW, PATIENCE).status
    found = VerificationView(name="v", uid="v", created_at=later(clock), started_at=later(clock))
    told = []
    for seconds in (29, 30, 7199, 7200, 7300):
        plan = decide(replace(observed(done, verify=True), verification=found), later(seconds), PATIENCE)
        verified = condition(plan.status, ConditionType.VERIFIED)
        assert verified is not None
        assert plan.again_at is not None
        told.append(("has no pod yet" in verified.message, (plan.again_at - later(seconds)).total_seconds()))
        done = plan.status
    # An hour ahead is believed once that hour is over; it does not matter any more then.
    assert [missing for missing, _ in told] == [False, True, True, True, True]
    assert [again for _, again in told][:2] == [1, 60]
    assert told[-1][1] == (10 if clock <= 0 else 300)
