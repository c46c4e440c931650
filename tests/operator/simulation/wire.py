"""The way from one operator to the simulated API server, on which requests are held up, lost, or the sender's last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from finetune_operator.errors import ApiError, api_error
from finetune_operator.wire import METADATA, METADATA_LIST, Raw, Wire
from tests.operator.simulation.server import Place, SimulatedServer, place_of

LATE_SECONDS = 3.0
"""After which a request arrives whose sender has died (seconds)."""


class Crash(BaseException):
    """The operator's process is dead."""


class Fate(Enum):
    """What becomes of a request."""

    LOST = "it does not arrive"
    UNANSWERED = "it is carried out, and the answer is lost"
    REFUSED = "the server is busy and wants to be left alone"
    LAST_WISH = "the operator dies before it is sent"
    LAST_WORD = "it is carried out, and the operator dies"
    LEGACY = "the operator dies, and it is carried out a while later"
    HELD = "it waits until it is let go"
    ANSWER_HELD = "it is carried out, and the answer waits until it is let go"


class Call(NamedTuple):
    """A request."""

    operator: int
    """Number of the operator that sent it."""
    task: str
    """What of that operator sent it: each reconcile is a task of its own."""
    version: int
    """resourceVersion of the last change before it arrived."""
    method: str
    place: Place
    body: Any
    made: int | None = None
    """resourceVersion of what it was answered with; None where it was refused, or not yet carried out."""

    @property
    def writes(self) -> bool:
        """Whether it asks for a change."""
        return self.method != "GET"


Witness = Callable[[Call, Sequence[Call]], None]


@dataclass
class Fault:
    """Meets one request to come."""

    fate: Fate
    countdown: int = 1
    """It meets the request of that number from now, counted from 1."""
    reads: bool = False
    """Whether reads are counted; writes are otherwise."""


class SimulatedWire(Wire):
    """Requests of one operator's process.

    Args:
        server: where they go.
        operator: the operator's number.
        latency_seconds: time of a request, and of its answer, on their way (seconds).
        witness: told of every request that arrives, and of those before it that this operator sent.
    """

    def __init__(
        self,
        server: SimulatedServer,
        operator: int,
        *,
        latency_seconds: float = 0.0,
        witness: Witness = lambda call, sent: None,
    ) -> None:
        self._server, self._operator, self._latency_seconds = server, operator, latency_seconds
        self._witness = witness
        self.faults: list[Fault] = []
        self.dead = False
        self.sent: list[Call] = []
        """Requests that have arrived."""
        self.written: list[Call] = []
        """Those of them that asked for a change and were granted."""
        self.hold_writes = False
        """Whether everything that asks for a change waits; events do not."""
        self.held: list[asyncio.Future[Fate | None]] = []
        """Requests that wait to be let go, oldest first."""

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
    ) -> Raw:
        """As Wire's."""
        task = asyncio.current_task()
        name = task.get_name() if task is not None else ""
        call = Call(self._operator, name, 0, method, place_of(path), body)
        fate = self._fate(call)
        if fate is Fate.HELD:
            fate = await self._hold()
        await self._way()
        if fate is Fate.LEGACY:
            asyncio.get_running_loop().call_later(LATE_SECONDS, self._arrive_late, call, method, path, body)
        if fate in (Fate.LAST_WISH, Fate.LEGACY):
            self.die()
        elif fate is Fate.LOST:
            raise api_error(None, "TimeoutError", "The API server gave no answer (it was made to).")
        elif fate is Fate.REFUSED:
            raise api_error(429, "TooManyRequests", "The API server is made to be busy.", 7.0)
        call = call._replace(version=self._server.version)
        self._witness(call, self.sent)
        self.sent.append(call)
        answer = self._server.handle(method, path, body, query)
        call = call._replace(made=_version_of(answer))
        self.sent[-1] = call
        self.written += [call] * call.writes
        if fate is Fate.LAST_WORD:
            self.die()
        if fate is Fate.ANSWER_HELD:
            fate = await self._hold()
        await self._way()
        if fate is Fate.UNANSWERED:
            raise api_error(None, "ServerDisconnectedError", "The API server gave no answer (the answer was lost).")
        return {"metadata": answer["metadata"]} if accept == METADATA else answer

    async def pages(self, path: str, query: Mapping[str, str], *, accept: str) -> AsyncIterator[list[Raw]]:
        """As Wire's, in one page."""
        answer = await self.request("GET", path, query=query)
        only_metadata = accept == METADATA_LIST
        yield [{"metadata": item["metadata"]} if only_metadata else item for item in answer["items"]]

    def _arrive_late(self, call: Call, method: str, path: str, body: Any) -> None:
        self._witness(call._replace(version=self._server.version), self.sent)
        with suppress(ApiError):
            self._server.handle(method, path, body)

    def die(self) -> None:
        """End the operator's process.

        Raises:
            Crash: always.
        """
        self.dead = True
        raise Crash

    def let_go(self, fate: Fate | None = None, *, only_first: bool = False) -> None:
        """What waits goes on, to meet a fate."""
        going, self.held = (self.held[:1], self.held[1:]) if only_first else (self.held, [])
        for held in going:
            held.set_result(fate)

    def _fate(self, call: Call) -> Fate | None:
        met = Fate.HELD if self.hold_writes and call.writes and call.place.plural != "events" else None
        for fault in [fault for fault in self.faults if fault.reads != call.writes]:
            fault.countdown -= 1
            if fault.countdown == 0:
                self.faults.remove(fault)
                met = met or fault.fate
        return met

    async def _hold(self) -> Fate | None:
        held: asyncio.Future[Fate | None] = asyncio.get_running_loop().create_future()
        self.held.append(held)
        return await held

    async def _way(self) -> None:
        await asyncio.sleep(self._latency_seconds)
        if self.dead:
            raise Crash


def _version_of(answer: Raw) -> int | None:
    version = answer["metadata"].get("resourceVersion")
    return int(version) if version is not None else None
