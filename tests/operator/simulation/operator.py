"""One process of the operator on the simulated API server: the real parts, put together as `app.Operator` does.

Its watches are the test's: what they have to tell waits here until it is delivered, and may be lost or told twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from functools import cache

from prometheus_client import CollectorRegistry

from finetune_api.outcome import TrainerStatus
from finetune_operator.app import SETTLE_SECONDS
from finetune_operator.cache import Cache
from finetune_operator.cluster import LIVE_PODS, Cluster
from finetune_operator.dispatch import Dispatcher
from finetune_operator.events import EventBroadcaster
from finetune_operator.names import FINETUNE_PLURAL, JOB_UID_LABEL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.progress.inbox import Inbox
from finetune_operator.progress.sender import Sender
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.reconcile import Reconciler
from finetune_operator.resync import Resync
from finetune_operator.serving.health import Heartbeat, Watch
from finetune_operator.serving.metrics import Metrics
from finetune_operator.settings import OperatorSettings
from tests.operator.simulation.server import Event, SimulatedServer
from tests.operator.simulation.wire import Crash, SimulatedWire, Witness

SELECTORS = {
    FINETUNE_PLURAL: ("", ""),
    PYTORCH_PLURAL: (JOB_UID_LABEL, ""),
    PODS_PLURAL: (JOB_UID_LABEL, LIVE_PODS),
}
"""Kind that is watched -> label and field selector."""


class NotedHeartbeat(Heartbeat):
    """One that also says what resyncs have found."""

    missed = 0
    """Objects of which no event had told the last resync."""

    def resynced(self, missed: Mapping[Watch, int]) -> None:
        """As Heartbeat's."""
        self.missed = sum(missed.values())
        super().resynced(missed)


class SimulatedOperator:
    """A process of the operator, from its start to its end.

    Args:
        server: the API server.
        settings: the operator's.
        loop: what it runs on.
        number: tells it from others.
        now: the world's clock, UTC.
        skew: how far its own clock is ahead of that.
        latency_seconds: time of a request, and of its answer, on their way (seconds).
        witness: told of every request that arrives.
    """

    def __init__(
        self,
        server: SimulatedServer,
        settings: OperatorSettings,
        loop: asyncio.AbstractEventLoop,
        *,
        number: int,
        now: Callable[[], datetime],
        skew: timedelta,
        latency_seconds: float,
        witness: Witness,
    ) -> None:
        self.wire = SimulatedWire(server, number, latency_seconds=latency_seconds, witness=witness)
        self._server, self._loop = server, loop

        def clock() -> datetime:
            return now() + skew

        self.now = clock
        """Its own clock, UTC."""
        cluster = Cluster(self.wire)
        self.heartbeat = NotedHeartbeat(settings.resync_seconds, clock=loop.time)
        self.queue = WorkQueue(
            lambda key: self.reconciler.reconcile(key),
            concurrency=settings.concurrency,
            settle_seconds=SETTLE_SECONDS,
            is_known=lambda key: self.cache.find(key) is not None,
            clock=loop.time,
        )
        self.inbox = Inbox(
            lambda namespace, name: self.queue.add(Key(namespace, name)),
            interval_seconds=settings.status_interval_seconds,
            now=clock,
            clock=loop.time,
            later=loop.call_later,
        )
        self.cache = Cache(self.inbox.forget)
        events = EventBroadcaster(cluster)
        self.reconciler = Reconciler(
            cluster,
            settings,
            cache=self.cache,
            inbox=self.inbox,
            authority=None,
            metrics=_metrics(),
            events=events,
            now=clock,
        )
        self._dispatcher = Dispatcher(self.queue, self.cache, self.heartbeat, forget=self.reconciler.forget, now=clock)
        self._resync = Resync(
            cluster,
            (None,),
            period_seconds=settings.resync_seconds,
            queue=self.queue,
            cache=self.cache,
            heartbeat=self.heartbeat,
        )
        self.pending: dict[str, deque[Event]] = {}
        """Kind -> what its watch has to tell, oldest first."""
        self.late: set[str] = set()
        """Kinds whose watch tells nothing until it is made to."""
        self._stop_watching: dict[str, Callable[[], None]] = {}
        for kind in SELECTORS:
            self.watch_anew(kind)
        self._tasks = [loop.create_task(self._live(part)) for part in (self.queue.run, events.run)]
        self.resync()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return not self.wire.dead

    def crash(self) -> None:
        """It is killed: what it has sent has arrived, and nothing more will."""
        self.wire.dead = True
        self._end()

    def watch_anew(self, kind: str) -> None:
        """List and watch a kind from now on, as at the start and after a watch that was told that it is too old."""
        if kind in self._stop_watching:
            self._stop_watching[kind]()
        labels, fields = SELECTORS[kind]

        def tell(event: Event) -> None:
            self.pending[kind].append(event)
            if kind not in self.late:
                self._loop.call_soon(self.deliver, kind)

        self.pending[kind] = deque()
        for raw in self._server.find(kind, labels=labels, fields=fields):
            tell(Event("LISTED", raw))
        self._stop_watching[kind] = self._server.watch(kind, tell, labels, fields)

    def deliver(self, kind: str, *, twice: bool = False) -> None:
        """The watch of a kind tells the oldest thing that it has to tell."""
        if self.alive and self.pending[kind]:
            event = self.pending[kind].popleft()
            for _ in range(2 if twice else 1):
                self._dispatcher.seen(kind, event.raw, event.type == "DELETED")

    def deliver_all(self) -> None:
        """Every watch tells all that it has to tell, and is on time from now on."""
        self.late.clear()
        for kind in SELECTORS:
            while self.pending[kind] and self.alive:
                self.deliver(kind)

    def resync(self) -> None:
        """Look over everything, again if that fails."""

        async def look() -> None:
            while not await self._resync.once():  # noqa: ASYNC110  as the operator does it
                await asyncio.sleep(5.0)

        self._tasks.append(self._loop.create_task(self._live(look)))

    def report(self, sender: Sender, status: TrainerStatus) -> bool:
        """A trainer's report comes in; whether it was accepted, as `TokenAuthorizer` decides."""
        current = self.cache.current_attempt(sender.namespace, sender.job_name, sender.job_uid)
        if not self.alive or current != (sender.attempt, sender.pytorchjob_uid):
            return False
        self.inbox.deliver(sender, status)
        return True

    def check(self) -> None:
        """Raise what a part of it died of, unless it was made to."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def _live(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except* Crash:
            self._end()

    def _end(self) -> None:
        for stop in self._stop_watching.values():
            stop()
        self._stop_watching.clear()
        self.pending = {kind: deque() for kind in SELECTORS}
        for task in self._tasks:
            task.cancel()


@cache
def _metrics() -> Metrics:
    """Of all operators: nobody reads them."""
    return Metrics(CollectorRegistry())
