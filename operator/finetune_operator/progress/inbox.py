"""Keeps the newest report of every job and wakes the reconciler, which alone writes status.

A sender may send what and as often as it likes, and its reports may come late, twice and in any order: of each only
the figures that have a place in status are kept, an older one never replaces a newer one, and a job is woken at most
once per interval, at its end when the interval is not over.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_api.outcome import TrainerStatus
from finetune_operator.progress.figures import condensed, sent_at
from finetune_operator.progress.sender import Sender

REMEMBERED = 20_000
"""Jobs whose report is kept; the one that has been silent longest is dropped first."""


@dataclass(frozen=True, order=True)
class _Age:
    """Compares reports of one job: attempts before pods before times, since every pod has its own clock."""

    attempt: int
    pod_created_at: datetime
    sent_at: datetime


@dataclass
class _Entry:
    age: _Age
    status: TrainerStatus
    received_at: datetime
    """By our clock, UTC."""
    woken_at: float | None = None
    """When the job was last woken, on the clock; None before."""
    wake_is_due: bool = False
    """True while a timer runs that will wake it."""


class Inbox:
    """The newest report of each job.

    Args:
        wake: takes namespace and name of a job that has something new; must not block.
        interval_seconds: least time between two wakes of the same job (seconds).
        now: wall clock, UTC.
        clock: monotonic seconds.
        later: calls a function after some seconds; the running event loop's `call_later` by default.
    """

    def __init__(
        self,
        wake: Callable[[str, str], None],
        *,
        interval_seconds: float,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self._wake = wake
        self._interval_seconds = interval_seconds
        self._now = now
        self._clock = clock
        self._later = later
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def deliver(self, sender: Sender, status: TrainerStatus) -> None:
        """Keep `status` if it is the newest of its job, and wake the job."""
        received = self._now()
        age = _Age(sender.attempt, sender.pod_created_at, sent_at(status, received))
        kept = condensed(status, received)
        entry = self._entries.get(sender.job_uid)
        if entry is None:
            entry = self._entries[sender.job_uid] = _Entry(age, kept, received)
            if len(self._entries) > REMEMBERED:
                self._entries.popitem(last=False)
        elif age < entry.age or (age, kept) == (entry.age, entry.status):  # late, or once more
            return
        else:
            entry.age, entry.status, entry.received_at = age, kept, received
            self._entries.move_to_end(sender.job_uid)
        self._wake_in_time(sender, entry)

    def newest(self, job_uid: str, attempt: int, since: datetime | None = None) -> TrainerStatus | None:
        """The newest report of that attempt, or None.

        Args:
            job_uid: uid of the FineTuneJob.
            attempt: number of the attempt.
            since: when it was last let go by whoever had suspended it, UTC; what came before was about pods that are
                gone. None: nobody had.
        """
        entry = self._entries.get(job_uid)
        if entry is None or entry.age.attempt != attempt or (since is not None and entry.received_at < since):
            return None
        return entry.status

    def forget(self, job_uid: str) -> None:
        """Drop what is kept of the job, because it has ended or is gone."""
        self._entries.pop(job_uid, None)

    def _wake_in_time(self, sender: Sender, entry: _Entry) -> None:
        if entry.wake_is_due:
            return
        wait_seconds = 0.0 if entry.woken_at is None else entry.woken_at + self._interval_seconds - self._clock()

        def wake() -> None:
            entry.wake_is_due = False
            entry.woken_at = self._clock()
            if self._entries.get(sender.job_uid) is entry:
                self._wake(sender.namespace, sender.job_name)

        if wait_seconds <= 0:
            wake()
        else:
            entry.wake_is_due = True
            later = self._later or asyncio.get_running_loop().call_later
            later(wait_seconds, wake)
