"""Which job is looked at next: each at most once at a time, however many events name it, and again when it asked to.

Events only name a key; what is to be done follows from what is read then. So a hundred events about one job cost one
look, and a lost event costs no more than the wait for the next resync.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

_log = logging.getLogger(__name__)


class Key(NamedTuple):
    """Names a job."""

    namespace: str
    name: str


class NotBefore(Exception):  # noqa: N818  said as the answer of a look
    """Raised by a look: the API server wants to be left alone for so many seconds, whatever happens meanwhile."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not before {seconds:g} s")
        self.seconds = seconds


@dataclass(slots=True)
class _Entry:
    due: float | None = None
    """Monotonic seconds at which it is to be looked at again; None when nothing is due."""
    ready: bool = False
    running: bool = False
    again: bool = False
    """An event came while it was running."""
    gone: bool = False
    not_before: float = field(default=float("-inf"))
    """Monotonic seconds of the earliest next look."""


class WorkQueue:
    """Runs `work` for keys, several at a time, one at a time per key.

    Args:
        work: looks at one job; returns after how many seconds to look again, or None. It may raise NotBefore.
        concurrency: jobs looked at at the same time.
        settle_seconds: least time between two looks at one job: a change comes with several events (seconds).
        clock: monotonic seconds; the event loop's by default.
    """

    def __init__(
        self,
        work: Callable[[Key], Awaitable[float | None]],
        *,
        concurrency: int,
        settle_seconds: float = 0.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._work = work
        self._concurrency = concurrency
        self._settle_seconds = settle_seconds
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._entries: dict[Key, _Entry] = {}
        self._fresh: deque[Key] = deque()
        self._ready: deque[Key] = deque()
        self._timers: list[tuple[float, int, Key]] = []
        self._sequence = itertools.count()
        self._wake = asyncio.Event()

    def depth(self) -> int:
        """Keys that could be looked at right now if anybody had time."""
        return len(self._fresh) + len(self._ready)

    def newcomers(self) -> int:
        """Jobs that wait for their very first look."""
        return len(self._fresh)

    def add(self, key: Key, *, after_seconds: float = 0.0, first: bool = False) -> None:
        """Look at `key`, at once or later. The earliest wish counts.

        Args:
            key: the job.
            after_seconds: not before that (seconds).
            first: before those that were looked at already; for jobs that wait for their very first look.
        """
        entry = self._entries.setdefault(key, _Entry())
        if entry.running and after_seconds <= 0:
            entry.again = True
            return
        if entry.ready:
            return
        now = self._clock()
        due = max(now + after_seconds, entry.not_before)
        if due <= now:
            self._make_ready(key, entry, first=first)
        elif entry.due is None or due < entry.due:
            entry.due = due
            heapq.heappush(self._timers, (due, next(self._sequence), key))
            self._wake.set()

    def forget(self, key: Key) -> None:
        """The job is gone: what was due is due no more."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.running or entry.ready:
            entry.gone = True
        else:
            del self._entries[key]

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            slots = asyncio.Semaphore(self._concurrency)
            while True:
                await slots.acquire()
                key = await self._next()
                group.create_task(self._look(key, slots))

    def _make_ready(self, key: Key, entry: _Entry, *, first: bool) -> None:
        entry.ready, entry.due = True, None
        (self._fresh if first else self._ready).append(key)
        self._wake.set()

    async def _next(self) -> Key:
        while True:
            now = self._clock()
            while self._timers and self._timers[0][0] <= now:
                due, _, key = heapq.heappop(self._timers)
                entry = self._entries.get(key)
                # An earlier wish may have replaced this one.
                if entry is not None and entry.due == due and not entry.running:
                    if entry.not_before > now:  # asked for before the look that said so
                        entry.due = entry.not_before
                        heapq.heappush(self._timers, (entry.due, next(self._sequence), key))
                        continue
                    self._make_ready(key, entry, first=False)
                elif entry is not None and entry.due == due:
                    entry.due, entry.again = None, True
            lane = self._fresh or self._ready
            if lane:
                return lane.popleft()
            self._wake.clear()
            wait = self._timers[0][0] - now if self._timers else None
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _look(self, key: Key, slots: asyncio.Semaphore) -> None:
        entry = self._entries[key]
        entry.ready, entry.running, entry.gone = False, True, False
        again_seconds: float | None = None
        pause_seconds = self._settle_seconds
        try:
            again_seconds = await self._work(key)
        except NotBefore as wish:
            again_seconds = wish.seconds
            pause_seconds = max(pause_seconds, wish.seconds)
        except Exception:  # a bug must not stop the other jobs
            _log.exception("Looking at %s/%s failed in an unforeseen way.", *key)
            again_seconds = 60.0
        finally:
            slots.release()
            entry.running, entry.not_before = False, self._clock() + pause_seconds
            again, entry.again = entry.again, False
            if again:
                self.add(key)
            if again_seconds is not None:
                self.add(key, after_seconds=again_seconds)
            if entry.gone and not entry.ready and entry.due is None:
                del self._entries[key]
