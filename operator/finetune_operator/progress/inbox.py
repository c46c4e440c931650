"""Keeps the newest report of every job and wakes the reconciler, which alone writes status.

A sender may send what and as often as it likes: of a report only the figures that have a place in status are kept, and
a job is woken at most once per interval, at its end when the interval is not over.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_api.outcome import TrainerStatus
from finetune_operator.progress.figures import condensed
from finetune_operator.progress.sender import Sender

REMEMBERED = 20_000
"""Jobs whose report is kept; the one that has been silent longest is dropped first."""


@dataclass
class _Entry:
    attempt: int
    status: TrainerStatus
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
        """Keep `status` as the newest of its job, unless a later attempt has already reported, and wake the job."""
        entry = self._entries.get(sender.job_uid)
        if entry is not None and entry.attempt > sender.attempt:
            return
        kept = condensed(status, self._now())
        if entry is None:
            entry = self._entries[sender.job_uid] = _Entry(sender.attempt, kept)
            if len(self._entries) > REMEMBERED:
                self._entries.popitem(last=False)
        else:
            entry.attempt, entry.status = sender.attempt, kept
            self._entries.move_to_end(sender.job_uid)
        self._wake_in_time(sender, entry)

    def newest(self, job_uid: str, attempt: int) -> TrainerStatus | None:
        """The newest report of that attempt, or None."""
        entry = self._entries.get(job_uid)
        return entry.status if entry is not None and entry.attempt == attempt else None

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
