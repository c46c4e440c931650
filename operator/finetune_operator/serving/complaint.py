"""A warning that strangers can cause as often as they like is one line a minute, which says how many were meant."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

EVERY_SECONDS = 60.0


class Complaint:
    """A sentence for the log.

    Args:
        log: where it goes.
        sentence: with places for what `__call__` is given, in the manner of `logging`.
        clock: monotonic seconds.
    """

    def __init__(self, log: logging.Logger, sentence: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._sentence = sentence
        self._clock = clock
        self._count = 0
        self._not_before = float("-inf")

    def __call__(self, *args: object) -> None:
        """It has happened once more; the newest stands for those that were not told."""
        self._count += 1
        now = self._clock()
        if now >= self._not_before:
            self._log.warning(f"{self._sentence} (%d since the last such line)", *args, self._count)
            self._count, self._not_before = 0, now + EVERY_SECONDS
