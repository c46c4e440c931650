"""Which job is reconciled next: each at most once at a time, however many events name it, and again when it asked to.

Events only name a key; what is to be done follows from what is there then. So a hundred events about one job cost one
reconcile, and a lost event costs no more than the wait for the next resync.
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

SPARE_TIMERS = 64
"""Void timers that may stay besides."""

_log = logging.getLogger(__name__)


class Key(NamedTuple):
    """Names a job."""

    namespace: str
    name: str


class NotBefore(Exception):  # noqa: N818  said as the answer of a reconcile
    """Raised by a reconcile: the API server wants to be left alone for so many seconds, whatever happens meanwhile."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not before {seconds:g} s")
        self.seconds = seconds


@dataclass(slots=True)
class _Entry:
    due: float | None = None
    """Monotonic seconds at which it is to be reconciled again; None when nothing is due."""
    ready: bool = False
    running: bool = False
    again: bool = False
    """An event came while it was running."""
    gone: bool = False
    not_before: float = field(default=float("-inf"))
    """Monotonic seconds of the earliest next reconcile."""


class WorkQueue:
    """Runs `reconcile` for keys, several at a time, one at a time per key.

    Args:
        reconcile: takes one job; returns after how many seconds to come again, or None. It may raise NotBefore.
        concurrency: jobs reconciled at the same time.
        settle_seconds: least time between two reconciles of one job: a change comes with several events (seconds).
        is_known: whether anybody knows of a job. Of one that nobody does nothing is kept, unless it is to be reconciled
            again: it may be there all the same, and only have to be read once that can be done.
        clock: monotonic seconds; the event loop's by default.
    """

    def __init__(
        self,
        reconcile: Callable[[Key], Awaitable[float | None]],
        *,
        concurrency: int,
        settle_seconds: float = 0.0,
        is_known: Callable[[Key], bool] = lambda _: True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._reconcile = reconcile
        self._concurrency = concurrency
        self._settle_seconds = settle_seconds
        self._is_known = is_known
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._entries: dict[Key, _Entry] = {}
        self._ready: deque[Key] = deque()
        self._timers: list[tuple[float, int, Key]] = []
        self._sequence = itertools.count()
        self._wake = asyncio.Event()

    def depth(self) -> int:
        """Keys that could be reconciled right now if anybody had time."""
        return len(self._ready)

    def size(self) -> int:
        """Keys of which something is kept: what is due, or that it was reconciled."""
        return len(self._entries)

    def timers(self) -> int:
        """Times that are kept, void ones included; no more than about twice as many as there are keys."""
        return len(self._timers)

    def add(self, key: Key, *, after_seconds: float = 0.0) -> None:
        """Reconcile `key`, at once or after some seconds. The earliest wish counts."""
        entry = self._entries.setdefault(key, _Entry())
        entry.gone = False
        if entry.running and after_seconds <= 0:
            entry.again = True
            return
        if entry.ready:
            return
        now = self._clock()
        due = max(now + after_seconds, entry.not_before)
        if due <= now:
            self._make_ready(key, entry)
        elif entry.due is None or due < entry.due:
            self._set_timer(key, entry, due)

    def forget(self, key: Key) -> None:
        """The job is gone: what was due is due no more."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.running or entry.ready:
            entry.gone, entry.due, entry.again = True, None, False
        else:
            del self._entries[key]

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            slots = asyncio.Semaphore(self._concurrency)
            while True:
                await slots.acquire()
                key = await self._next()
                group.create_task(self._run(key, slots))

    def _make_ready(self, key: Key, entry: _Entry) -> None:
        entry.ready, entry.due = True, None
        self._ready.append(key)
        self._wake.set()

    def _set_timer(self, key: Key, entry: _Entry, due: float) -> None:
        entry.due = due
        heapq.heappush(self._timers, (due, next(self._sequence), key))
        self._wake.set()
        if len(self._timers) > 2 * len(self._entries) + SPARE_TIMERS:
            # A job that is reconciled every few seconds leaves a void one behind each time, of its deadline in a day.
            valid = {(entry.due, key) for key, entry in self._entries.items() if entry.due is not None}
            kept = {(due, key): (due, number, key) for due, number, key in self._timers if (due, key) in valid}
            self._timers = list(kept.values())
            heapq.heapify(self._timers)

    async def _next(self) -> Key:
        while True:
            now = self._clock()
            while self._timers and self._timers[0][0] <= now:
                due, _, key = heapq.heappop(self._timers)
                entry = self._entries.get(key)
                # An earlier wish may have replaced this one.
                if entry is not None and entry.due == due and not entry.running:
                    if entry.not_before > now:  # asked for before the reconcile that said so
                        self._set_timer(key, entry, entry.not_before)
                        continue
                    self._make_ready(key, entry)
                elif entry is not None and entry.due == due:
                    entry.due, entry.again = None, True
            if self._ready:
                return self._ready.popleft()
            self._wake.clear()
            wait = self._timers[0][0] - now if self._timers else None
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _run(self, key: Key, slots: asyncio.Semaphore) -> None:
        entry = self._entries[key]
        entry.ready, entry.running = False, True
        again_seconds: float | None = None
        pause_seconds = self._settle_seconds
        try:
            again_seconds = await self._reconcile(key)
        except NotBefore as wish:
            again_seconds = wish.seconds
            pause_seconds = max(pause_seconds, wish.seconds)
        except Exception:  # a bug must not stop the other jobs
            _log.exception("Reconciling %s/%s failed in an unforeseen way.", *key)
            again_seconds = 60.0
        finally:
            slots.release()
            entry.running, entry.not_before = False, self._clock() + pause_seconds
            again, entry.again = entry.again, False
            if again:
                self.add(key)
            if again_seconds is not None and not entry.gone:
                self.add(key, after_seconds=again_seconds)
            if (entry.gone or not self._is_known(key)) and not entry.ready and entry.due is None:
                del self._entries[key]
