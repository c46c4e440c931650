"""The newest report of a job is kept, its job is woken in time, and a busy sender changes neither."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from finetune_api.outcome import Metric, TrainerStatus
from finetune_operator.progress import inbox as inbox_module
from finetune_operator.progress.inbox import Inbox
from finetune_operator.progress.sender import Sender

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def sender(uid: str = "uid-1", attempt: int = 1) -> Sender:
    return Sender("team-a", f"job-of-{uid}", uid, attempt, "uid-of-pytorchjob", "pod")


def report(percent: int) -> TrainerStatus:
    return TrainerStatus(
        progress_percentage=percent,
        metrics=[Metric(name="grad_norm", value="1")],
        last_updated_time="2030-01-02T03:04:05Z",
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
            now=lambda: NOW,
            clock=lambda: self.seconds,
            later=lambda seconds, call: self.timers.append((self.seconds + seconds, call)),
        )

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        due = [call for at, call in self.timers if at <= self.seconds]
        self.timers = [timer for timer in self.timers if timer[0] > self.seconds]
        for call in due:
            call()

    def percent(self, uid: str = "uid-1", attempt: int = 1) -> int | None:
        status = self.inbox.newest(uid, attempt)
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
    for uid in ("first", "second", "first", "third"):
        setting.inbox.deliver(sender(uid), report(1))
    assert [setting.percent(uid) for uid in ("first", "second", "third")] == [1, None, 1]


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
