"""Stretches in which the whole machine stood still.

A virtual machine that is copied or moved, or whose host is short of processors, stops for seconds, and counts them as
processor time of whoever ran. What is measured then says nothing about the code. Another process than the one that is
measured notices: it wakes up late.
"""

from __future__ import annotations

import threading
import time

WAKES_SECONDS = 0.02
LATE_SECONDS = 0.25
"""Later than that no busy machine wakes a thread up."""
_AROUND_SECONDS = 0.5
"""Clocks of two processes are read at different moments."""


class Pauses:
    """Notices pauses from `start` on."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float]] = []
        self._last: float | None = None

    def start(self) -> None:
        """Look for them on a thread."""
        threading.Thread(target=self._look_for_ever, name="pauses", daemon=True).start()

    def woke(self, now: float) -> None:
        """It is `now` (seconds since the epoch), and was to be WAKES_SECONDS after the last time."""
        if self._last is not None and now - self._last > LATE_SECONDS:
            self._found.append((self._last, now))
        self._last = now

    def within(self, begin: float, end: float) -> float:
        """Seconds of the pauses that reach into what lies between two moments."""
        near = [(a, b) for a, b in self._found if a < end + _AROUND_SECONDS and b > begin - _AROUND_SECONDS]
        return sum(b - a for a, b in near)

    def _look_for_ever(self) -> None:
        while True:
            self.woke(time.time())
            time.sleep(WAKES_SECONDS)
