"""So many at once and then so many per second, for each of many keys: bounds what strangers may cost."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

KEYS = 4096
"""Keys whose level is remembered; the one that was used longest ago is forgotten first, and its level with it."""

K = TypeVar("K", bound=Hashable)


class Budget(Generic[K]):
    """A token bucket per key, full at first.

    Args:
        burst: what may be taken at once.
        per_second: what comes back by itself.
        clock: monotonic seconds.
    """

    def __init__(self, burst: float, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._levels: OrderedDict[K, tuple[float, float]] = OrderedDict()
        """Level and when it was that, by key; a key that is not here has all."""

    def __len__(self) -> int:
        """Keys that are remembered."""
        return len(self._levels)

    def has(self, key: K) -> bool:
        """Whether one can be taken."""
        return self._level(key) >= 1

    def take(self, key: K) -> bool:
        """Take one if there is one; whether there was."""
        level = self._level(key)
        if level < 1:
            return False
        self._set(key, level - 1)
        return True

    def give_back(self, key: K) -> None:
        """One that was taken costs nothing after all."""
        self._set(key, self._level(key) + 1)

    def wait_seconds(self, key: K) -> float:
        """How long until one can be taken (seconds)."""
        return max(0.0, (1 - self._level(key)) / self._per_second)

    def _level(self, key: K) -> float:
        level, at = self._levels.get(key, (self._burst, 0.0))
        return min(self._burst, level + (self._clock() - at) * self._per_second)

    def _set(self, key: K, level: float) -> None:
        self._levels.pop(key, None)
        if level < self._burst:
            self._levels[key] = level, self._clock()
            if len(self._levels) > KEYS:
                self._levels.popitem(last=False)
