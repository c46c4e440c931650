"""How ranks wait for work that one of them does, for hours if need be: through the job's key-value store.

A collective would do too, but its time-out must be short, for a rank that hangs in one says nothing at all. Here a
rank that fails tells the others, one that vanishes is noticed, and signals are heard while a rank waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.launch.failures import quoted

WAIT_LIMIT = timedelta(hours=12)
"""How long a rank waits for another's work, the longest of which fetches, tokenizes or merges a very large input."""

_FAILED = "failed"
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.001, 0.5


class Store(Protocol):
    """What is used of torch's Store."""

    def add(self, key: str, amount: int, /) -> int:
        """Count up; the new value."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of them are set."""

    def set(self, key: str, value: str, /) -> None:
        """Set it."""

    def get(self, key: str, /) -> bytes:
        """Its value; waits until it is set."""


class Meetings:
    """Points at which this rank waits for others. All ranks pass the same ones in the same order.

    Args:
        store: shared by all ranks, with keys of nobody else.
        rank: this one.
        processes: process id by rank, of the ranks on this node.
        limit: longest wait.
        clock: monotonic seconds.
        sleep: of so many seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        processes: Mapping[int, int],
        limit: timedelta = WAIT_LIMIT,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._rank = rank
        self._processes = processes
        self._limit_seconds = limit.total_seconds()
        self._clock = clock
        self._sleep = sleep
        self._passed = 0

    def meet(self, *, comes: bool, expected: int) -> None:
        """Wait until `expected` ranks have come.

        Args:
            comes: whether this is one of them. Every rank waits, and so does nobody who is alone in coming.
            expected: at least 1, the same on all ranks.

        Raises:
            JobError: PeerFailed, another rank failed or vanished, or none came in all that time.
        """
        key = f"meeting-{self._passed}"
        self._passed += 1
        if comes and self._store.add(f"{key}-came", 1) == expected:
            self._store.set(key, "")
        began = self._clock()
        while not self._store.check([key]):
            waited = self._clock() - began
            trouble = self._trouble(waited)
            # The last to come may have gone since it was looked for.
            if trouble is not None and not self._store.check([key]):
                raise JobError(Reason.PEER_FAILED, trouble)
            self._sleep(min(max(waited / 20, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Let the others, wherever they wait, know of an exception that leaves this block."""
        try:
            yield
        except BaseException as error:
            words = error.message if isinstance(error, JobError) else quoted(error)
            # The store may be what failed.
            with suppress(Exception):
                if not self._store.check([_FAILED]):
                    self._store.set(_FAILED, f"rank {self._rank} failed: {words}")
            raise

    def _trouble(self, waited_seconds: float) -> str | None:
        """Why to wait no longer."""
        if self._store.check([_FAILED]):
            words = self._store.get(_FAILED).decode()
            return f"Rank {self._rank} ended because another did, which is where the cause is to be found ({words})."
        gone = [rank for rank, process in self._processes.items() if not _lives(process)]
        if gone:
            return f"Rank {self._rank} ended because rank {gone[0]} vanished, which is where the cause is to be found."
        if waited_seconds >= self._limit_seconds:
            return (
                f"Rank {self._rank} waited {self._limit_seconds / 3600:.0f} hours for the others, one of which hangs: "
                "look for the rank whose log ends first, and start the job again."
            )
        return None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
