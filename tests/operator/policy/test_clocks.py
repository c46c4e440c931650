"""Back-off, deadline and TTL: when something happens, from what status holds alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.status import Attempt, FineTuneJobStatus
from finetune_operator.policy import deadline, retry, ttl
from finetune_operator.policy.times import moment, rfc3339, seconds_between
from tests.operator.policy.views import NOW, later

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
        ([SUSPENDED], None),
        ([FAILED, FAILED, SUSPENDED], None),
        ([FAILED, SUSPENDED, FAILED], 10),
    ],
)
def test_waits_double_since_the_last_suspension(reasons: Sequence[str], seconds: float | None) -> None:
    found = retry.next_attempt_at(attempts(*reasons), base_seconds=10, limit_seconds=360)
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


@pytest.mark.parametrize(("failures", "limit", "over"), [(0, 0, False), (1, 0, True), (3, 3, False), (4, 3, True)])
def test_the_limit_is_how_many_failures_are_repeated(failures: int, limit: int, over: bool) -> None:
    assert retry.exhausted(failures, limit) == over


@given(st.lists(st.tuples(st.booleans(), st.integers(-50, 100)), max_size=30))
def test_active_seconds_never_shrink_whatever_clocks_do(turns: list[tuple[bool, int]]) -> None:
    status, clock, before = FineTuneJobStatus(), 0, 0
    for active, seconds in turns:
        clock += seconds
        deadline.account(status, active=active, since=later(clock))
        assert (status.active_seconds or 0) >= before
        assert (status.active_since is not None) == active
        before = status.active_seconds or 0


def test_only_active_time_counts() -> None:
    status = FineTuneJobStatus()
    deadline.account(status, active=True, since=later(0))
    deadline.account(status, active=True, since=later(50))
    assert deadline.deadline(status, 100) == later(100)
    deadline.account(status, active=False, since=later(60))
    assert deadline.deadline(status, 100) is None
    assert not deadline.exceeded(status, 100, later(10_000))
    deadline.account(status, active=True, since=later(20_000))
    assert deadline.deadline(status, 100) == later(20_040)
    assert not deadline.exceeded(status, 100, later(20_039))
    assert deadline.exceeded(status, 100, later(20_040))
    assert not deadline.exceeded(status, None, later(10**6))
    assert deadline.deadline(status, None) is None


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


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_time_survives_being_written(time: datetime) -> None:
    assert moment(rfc3339(time)) == time.replace(microsecond=0)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-01-31", "2026-01-31T12:00:00", "2026-13-01T00:00:00Z"])
def test_what_is_no_time_is_none(text: str) -> None:
    assert moment(text) is None


def test_time_between_two_machines_is_never_negative() -> None:
    assert seconds_between(later(5), NOW) == 0
