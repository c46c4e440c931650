"""The newest report of a job is kept, its job is woken in time, and a busy sender changes neither."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.outcome import Metric, TrainerStatus
from finetune_operator.progress import inbox as inbox_module
from finetune_operator.progress.inbox import Inbox
from finetune_operator.progress.sender import Sender

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def sender(uid: str = "uid-1", attempt: int = 1, pod: int = 0) -> Sender:
    """The first worker of an attempt; `pod` counts its pods, one after each suspension."""
    return Sender("team-a", f"job-of-{uid}", uid, attempt, "uid-of-pytorchjob", "pod", NOW + timedelta(minutes=pod))


def report(percent: int, at: datetime = NOW) -> TrainerStatus:
    return TrainerStatus(
        progress_percentage=percent,
        metrics=[Metric(name="grad_norm", value="1")],
        last_updated_time=at.isoformat(),
    )


class Setting:
    """An inbox whose time is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.woken: list[tuple[str, str]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.inbox = Inbox(
            lambda namespace, name: self.woken.append((namespace, name)),
            interval_seconds=5.0,
            now=lambda: NOW + timedelta(seconds=self.seconds),
            clock=lambda: self.seconds,
            later=lambda seconds, call: self.timers.append((self.seconds + seconds, call)),
        )

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        due = [call for at, call in self.timers if at <= self.seconds]
        self.timers = [timer for timer in self.timers if timer[0] > self.seconds]
        for call in due:
            call()

    def percent(self, uid: str = "uid-1", attempt: int = 1, since: float | None = None) -> int | None:
        status = self.inbox.newest(uid, attempt, None if since is None else NOW + timedelta(seconds=since))
        return None if status is None else status.progress_percentage


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_the_newest_report_is_kept_condensed_and_only_for_its_attempt(setting: Setting) -> None:
    for percent in (1, 2, 3):
        setting.inbox.deliver(sender(), report(percent))
    assert setting.percent() == 3
    assert setting.percent(attempt=2) is None
    assert setting.percent("uid-2") is None
    status = setting.inbox.newest("uid-1", 1)
    assert status is not None
    assert status.metrics == []


def test_a_later_attempt_replaces_an_earlier_one_and_never_the_other_way_round(setting: Setting) -> None:
    setting.inbox.deliver(sender(attempt=2), report(20))
    setting.inbox.deliver(sender(attempt=1), report(10))
    assert (setting.percent(attempt=1), setting.percent(attempt=2)) == (None, 20)
    setting.inbox.deliver(sender(attempt=3), report(30))
    assert (setting.percent(attempt=2), setting.percent(attempt=3)) == (None, 30)


def sent(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def test_a_report_that_was_overtaken_does_not_replace_the_newer_one_and_wakes_nobody(setting: Setting) -> None:
    setting.seconds = 100
    setting.inbox.deliver(sender(), report(20, sent(99)))
    setting.advance(60)
    setting.inbox.deliver(sender(), report(10, sent(98.9)))
    assert setting.percent() == 20
    assert len(setting.woken) == 1


def test_a_report_that_comes_twice_wakes_once_and_is_no_news(setting: Setting) -> None:
    setting.inbox.deliver(sender(), report(10))
    setting.advance(60)
    setting.inbox.deliver(sender(), report(10))
    assert len(setting.woken) == 1
    assert setting.percent(since=1) is None


def test_of_two_that_contradict_each_other_the_later_counts(setting: Setting) -> None:
    setting.inbox.deliver(sender(), report(50))
    setting.inbox.deliver(sender(), report(40))
    assert setting.percent() == 40


def test_a_new_pod_of_the_attempt_counts_whatever_its_clock_says_and_the_old_one_no_more(setting: Setting) -> None:
    setting.seconds = 1000
    setting.inbox.deliver(sender(pod=1), report(80, sent(1000)))
    setting.inbox.deliver(sender(pod=2), report(1, sent(700)))
    assert setting.percent() == 1
    setting.inbox.deliver(sender(pod=1), report(81, sent(1000)))
    assert setting.percent() == 1


@pytest.mark.parametrize("wrong_by", [3600, 300, -300, -3600])
def test_a_clock_that_is_wrong_and_then_put_right_holds_no_report_up(setting: Setting, wrong_by: int) -> None:
    """Unless it is put back by minutes: until it is that late again the newest report stays."""
    setting.seconds = 10_000
    setting.inbox.deliver(sender(), report(1, sent(setting.seconds + wrong_by)))
    setting.advance(5)
    setting.inbox.deliver(sender(), report(2, sent(setting.seconds + wrong_by)))
    assert setting.percent() == 2
    setting.advance(5)
    setting.inbox.deliver(sender(), report(3, sent(setting.seconds)))
    assert setting.percent() == 3


def test_what_came_before_the_attempt_was_let_go_again_is_not_served(setting: Setting) -> None:
    setting.seconds = 100
    setting.inbox.deliver(sender(), report(80, sent(100)))
    assert [setting.percent(since=since) for since in (99, 100, 101)] == [80, 80, None]
    setting.seconds = 200
    setting.inbox.deliver(sender(pod=1), report(5, sent(200)))
    assert setting.percent(since=101) == 5


DELIVERIES = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 2), st.floats(0, 500), st.floats(0, 20)), min_size=1, max_size=20
)


@given(DELIVERIES)
def test_however_reports_come_the_newest_is_kept(deliveries: list[tuple[int, int, float, float]]) -> None:
    """Of senders whose clocks are right: attempt, pod, how long a report was on its way, and the wait for the next."""
    setting = Setting()
    setting.seconds = 1000
    newest = None
    for number, (attempt, pod, late, wait) in enumerate(deliveries):
        at = setting.seconds - late
        setting.inbox.deliver(sender(attempt=attempt, pod=pod), report(number, sent(at)))
        age = (attempt, pod, sent(at))
        if newest is None or age >= newest[0]:
            newest = age, number
        assert setting.percent(attempt=newest[0][0]) == newest[1]
        setting.advance(wait)


def test_a_job_is_woken_at_once_then_once_per_interval_and_the_last_report_is_not_lost(setting: Setting) -> None:
    job = ("team-a", "job-of-uid-1")
    setting.inbox.deliver(sender(), report(1))
    assert setting.woken == [job]
    for percent in range(2, 50):
        setting.advance(0.1)
        setting.inbox.deliver(sender(), report(percent))
    assert setting.woken == [job]
    assert len(setting.timers) == 1
    setting.advance(5.0)
    assert setting.woken == [job] * 2
    assert setting.percent() == 49
    setting.advance(60.0)
    assert setting.woken == [job] * 2
    setting.inbox.deliver(sender(), report(50))
    assert setting.woken == [job] * 3


def test_a_busy_job_does_not_keep_another_from_being_woken(setting: Setting) -> None:
    for percent in range(3):
        setting.inbox.deliver(sender("busy"), report(percent))
    setting.inbox.deliver(sender("quiet"), report(1))
    assert setting.woken == [("team-a", "job-of-busy"), ("team-a", "job-of-quiet")]


def test_a_forgotten_job_has_no_report_and_is_not_woken_any_more(setting: Setting) -> None:
    setting.inbox.deliver(sender(), report(1))
    setting.inbox.deliver(sender(), report(2))
    setting.inbox.forget("uid-1")
    setting.inbox.forget("uid-1")
    setting.advance(60.0)
    assert len(setting.woken) == 1
    assert setting.percent() is None


def test_the_job_that_has_been_silent_longest_gives_way(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "REMEMBERED", 2)
    for number, uid in enumerate(("first", "second", "first", "third")):
        setting.inbox.deliver(sender(uid), report(number))
    assert [setting.percent(uid) for uid in ("first", "second", "third")] == [2, None, 3]


def test_by_itself_the_event_loop_wakes() -> None:
    async def run() -> int:
        woken = asyncio.Semaphore(0)
        inbox = Inbox(lambda *job: woken.release(), interval_seconds=0.01)
        inbox.deliver(sender(), report(1))
        inbox.deliver(sender(), report(2))
        await woken.acquire()
        await asyncio.wait_for(woken.acquire(), 60)
        status = inbox.newest("uid-1", 1)
        assert status is not None
        return status.progress_percentage or 0

    assert asyncio.run(run()) == 2
