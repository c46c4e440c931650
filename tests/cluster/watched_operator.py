"""`python watched_operator.py`: the operator with a watchdog on its event loop, as the tests run it.

Everything that the operator does shares one event loop, so whatever keeps it for long keeps every job, report and probe
waiting. Every callback that took more than LIMIT_SECONDS of processor time becomes a line of the file that FILE_ENV
names, with the stack that was seen while it ran. Processor time and not time that passed: on a busy machine a process
waits for its turn, which is no fault of its own. Nothing is exempt: imports happen before the loop begins, contexts of
TLS take milliseconds, and a pass of the garbage collector keeps a probe waiting like anything else.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE_ENV = "WATCHDOG_FILE"
"""Variable with the path of the file that takes the lines."""
LIMIT_SECONDS = 0.05
"""Processor time that one callback may take (seconds)."""
COLLECTOR = "The garbage collector"
SAMPLE_SECONDS = 0.01
"""Time between two looks at the stack (seconds)."""


@dataclass(frozen=True)
class Blocked:
    """A callback that kept the event loop for too long."""

    what: str
    """The callback, or the coroutine of the task."""
    seconds: float
    """Processor time of the thread."""
    stack: str
    """What it was doing then, innermost last; empty where it was over before anybody looked."""
    ended: float = field(default=0.0, compare=False)
    """When, in seconds since the epoch."""

    def __str__(self) -> str:
        """For the one who reads why a test failed."""
        return f"{self.what} kept the event loop for {self.seconds * 1000:.0f} ms of processor time:\n{self.stack}"


def read_blocked(file: Path, since: int = 0) -> list[Blocked]:
    """What was written behind a position (bytes)."""
    if not file.exists():
        return []
    with file.open("rb") as lines:
        lines.seek(since)
        return [Blocked(**json.loads(line)) for line in lines]


class Watchdog:
    """Watches the event loops of the thread that it is made in.

    Args:
        tell: takes what kept a loop for too long.
        limit_seconds: see LIMIT_SECONDS.
    """

    def __init__(self, tell: Callable[[Blocked], None], limit_seconds: float = LIMIT_SECONDS) -> None:
        self._tell = tell
        self._limit_seconds = limit_seconds
        self._thread = threading.get_ident()
        self._number = 0
        """Of the callback that runs."""
        self._began: float | None = None
        """Processor time of the thread when it began; None while none runs."""
        self._sample: tuple[int, str] = (0, "")
        self._collection_began = 0.0
        self._collecting_seconds = 0.0

    def install(self) -> None:
        """Watch from now on."""
        run = asyncio.events.Handle._run

        def watched(handle: asyncio.Handle) -> None:
            if threading.get_ident() != self._thread:
                run(handle)
                return
            self._number += 1
            self._collecting_seconds = 0.0
            self._began = began = time.thread_time()
            try:
                run(handle)
            finally:
                self._began = None
                seconds = time.thread_time() - began
                if seconds > self._limit_seconds:
                    self._judge(handle, seconds)

        asyncio.events.Handle._run = watched  # type: ignore[method-assign, assignment] # that is the point
        gc.callbacks.append(self._collection)
        threading.Thread(target=self._look_for_ever, name="watchdog", daemon=True).start()

    def _judge(self, handle: asyncio.Handle, seconds: float) -> None:
        number, sample = self._sample
        stack = sample if number == self._number else ""
        # Apart, since a collection is not the fault of the callback that it happens in.
        for what, spent in (
            (_name(handle), seconds - self._collecting_seconds),
            (COLLECTOR, self._collecting_seconds),
        ):
            if spent > self._limit_seconds:
                self._tell(Blocked(what, round(spent, 3), stack, time.time()))

    def _collection(self, phase: str, info: dict[str, int]) -> None:
        if threading.get_ident() == self._thread:
            if phase == "start":
                self._collection_began = time.thread_time()
            else:
                self._collecting_seconds += time.thread_time() - self._collection_began

    def _look_for_ever(self) -> None:
        clock = time.pthread_getcpuclockid(self._thread)
        while True:
            time.sleep(SAMPLE_SECONDS)
            number, began = self._number, self._began
            if began is not None and time.clock_gettime(clock) - began > self._limit_seconds / 2:
                frame = sys._current_frames().get(self._thread)
                if frame is not None:
                    self._sample = number, "".join(traceback.format_stack(frame))


def _name(handle: asyncio.Handle) -> str:
    callback: Any = getattr(handle, "_callback", None)
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return f"The task {getattr(owner.get_coro(), '__qualname__', owner)}"
    return f"The callback {getattr(callback, '__qualname__', callback)}"


def watch_into(file: Path) -> None:
    """Watch the event loops of this thread; what keeps them for too long is added to the file."""

    def tell(blocked: Blocked) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(blocked)) + "\n")

    Watchdog(tell).install()


if __name__ == "__main__":
    watch_into(Path(os.environ[FILE_ENV]))
    from finetune_operator.__main__ import main

    sys.exit(main())
