"""Decides who may have a connection of a port, so that no client costs the others theirs, or the operator its time.

An address may have so many connections at once, and make so many per second that lead to nothing. When all places are
taken, one of whoever has most gives way. When too many lead to nothing in all, everybody waits: progress may be late,
the reconciler shares its event loop with these ports and may not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.serving.budget import Budget

ALL = ""
"""Key of what all addresses share."""


@dataclass(frozen=True)
class Limits:
    """What a port grants."""

    connections: int = 128
    """Connections that are open at the same time. A trainer's lasts some milliseconds per report."""
    connections_of_one: int = 16
    """Those of one address. Behind a translated address there may be a hundred trainers."""
    grace_seconds: float = 1.0
    """How long a connection is left alone, however many wait (seconds)."""
    fruitless_burst: int = 100
    """Connections of one address, at once, that lead to nothing."""
    fruitless_per_second: float = 20.0
    """Those that it may make for ever: a fiftieth of the event loop, with TLS."""
    all_fruitless_burst: int = 500
    """Those of all addresses, at once."""
    all_fruitless_per_second: float = 100.0
    """Those that all addresses together may make for ever."""
    handshake_seconds: float = 5.0
    """How long a client may take to agree on a TLS connection, and to take leave of it (seconds)."""
    request_seconds: float = 5.0
    """How long it may take to send its request, up to the end of the headers (seconds)."""
    life_seconds: float = 30.0
    """How long a connection may last, whatever happens on it (seconds)."""
    received_bytes: int = 128 * 1024
    """What may come in over one connection: a request with its body."""


@dataclass(eq=False)
class Place:
    """One connection's."""

    peer: str
    since: float
    cut: Callable[[], object]


class Admission:
    """The places of one port.

    Args:
        limits: what it grants.
        clock: monotonic seconds.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._places: dict[str, list[Place]] = {}
        """By address; the oldest first."""
        self._count = 0
        self._left = asyncio.Event()
        self._budget = Budget[str](limits.fruitless_burst, limits.fruitless_per_second, clock=clock)
        self._shared = Budget[str](limits.all_fruitless_burst, limits.all_fruitless_per_second, clock=clock)

    def __len__(self) -> int:
        """Connections that are open."""
        return self._count

    async def room(self) -> None:
        """Wait until another connection may be accepted."""
        while (wait := self.wait_seconds()) > 0:
            self._left.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._left.wait()
            except TimeoutError:
                continue

    def wait_seconds(self) -> float:
        """How long until another connection may be accepted, if none ends before (seconds)."""
        wait = self._shared.wait_seconds(ALL)
        if self._count >= self._limits.connections:
            oldest = min(places[0].since for places in self._places.values())
            wait = max(wait, oldest + self._limits.grace_seconds - self._clock())
        return max(0.0, wait)

    def admits(self, peer: str) -> bool:
        """Whether a connection from address `peer` gets a place."""
        return len(self._places.get(peer, ())) < self._limits.connections_of_one and self._budget.has(peer)

    def enter(self, peer: str, cut: Callable[[], object]) -> Place:
        """Give a connection that is admitted its place.

        Args:
            peer: the address that it comes from.
            cut: ends it; called when it has to give way to another.
        """
        self._budget.take(peer)
        self._shared.take(ALL)
        if self._count >= self._limits.connections:
            self._give_way()
        place = Place(peer, self._clock(), cut)
        self._places.setdefault(peer, []).append(place)
        self._count += 1
        return place

    def leave(self, place: Place) -> None:
        """The connection has ended; nothing happens when it already gave way."""
        places = self._places.get(place.peer, [])
        if place not in places:
            return
        places.remove(place)
        if not places:
            del self._places[place.peer]
        self._count -= 1
        self._left.set()

    def fruitful(self, peer: str) -> None:
        """A connection of `peer` led to something: it counts no more."""
        self._budget.give_back(peer)
        self._shared.give_back(ALL)

    def _give_way(self) -> None:
        """The oldest connection of whoever has most ends, among those that were not left alone long enough."""
        before = self._clock() - self._limits.grace_seconds
        candidates = [places for places in self._places.values() if places[0].since <= before]
        if not candidates:
            return
        place = max(candidates, key=len)[0]
        self.leave(place)
        place.cut()
