"""Posts Kubernetes events about jobs, behind their backs: no reconcile waits until its events are told.

They are for people: one that cannot be posted is logged, and nothing else. One sender posts them in their order, as
client-go's broadcaster does, so that a burst of jobs is not slowed down by what is said about it: it has one request on
its way where reconciles have sixteen. What waits is bounded: who records more than can be posted waits, and nothing is
dropped as long as the API server takes events at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError
from finetune_operator.names import MANAGER
from finetune_operator.policy.times import rfc3339
from finetune_operator.policy.transitions import Event
from finetune_operator.serving.budget import Budget
from finetune_operator.serving.complaint import Complaint

MESSAGE_LIMIT = 1024
"""Most characters that the API server takes in an event's message."""
QUEUE_LIMIT = 2000
"""Events that may wait, of about 2 KB each."""
JOB_BURST, JOB_PER_SECOND = 50, 0.1
"""Events that a job may have at once, and then per second. Whoever edits a job all the time would have one sender and
the store of all busy with what is wrong with it; what is left out stands in status, too."""
TRIES = 3
"""Times that an event is posted while the API server asks to be left alone for a moment."""
MOMENT_SECONDS = 10.0
"""Longest such moment (seconds)."""
PATIENCE_SECONDS = 5.0
"""Longest that a reconcile waits for room in the queue (seconds): an API server may take everything but events."""
FLUSH_SECONDS = 5.0
"""Time in which what waits is still posted when the operator ends (seconds)."""

_log = logging.getLogger(__name__)


class EventBroadcaster:
    """Posts events, in the order in which they were recorded.

    Args:
        cluster: the API server.
        clock: monotonic seconds.
    """

    def __init__(self, cluster: Cluster, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._left_out = Complaint(_log, "Events of %s/%s were left out: it has too many", clock=clock)
        self._budget: Budget[str] = Budget(JOB_BURST, JOB_PER_SECOND, clock=clock)
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(QUEUE_LIMIT)

    async def record(self, job: Mapping[str, Any], events: Iterable[Event], now: datetime) -> None:
        """Have `events` about `job` posted soon. Waits only while too many others do, and not for long."""
        metadata = job["metadata"]
        bodies = []
        for event in events:
            if self._budget.take(metadata["uid"]):
                bodies.append(_body(job, event, now))
            else:
                self._left_out(metadata["namespace"], metadata["name"])
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while bodies:
                    await self._queue.put(bodies[0])
                    del bodies[0]
        except TimeoutError:
            for body in bodies:
                _log_unposted(body, f"{QUEUE_LIMIT} others wait")

    def waiting(self) -> int:
        """How many events wait."""
        return self._queue.qsize()

    async def run(self) -> None:
        """Post for ever what is recorded."""
        try:
            while True:
                body = await self._queue.get()
                try:
                    await self._post(body)
                finally:
                    self._queue.task_done()
        finally:
            if self.waiting():
                _log.warning("%d events were not posted before the operator ended.", self.waiting())

    async def flush(self) -> None:
        """Wait until everything recorded is posted, but no longer than FLUSH_SECONDS. `run` has to run meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._queue.join()

    async def _post(self, body: Mapping[str, Any]) -> None:
        for tries_left in reversed(range(TRIES)):
            try:
                await self._cluster.create_event(body["metadata"]["namespace"], body)
                return
            except ApiError as error:
                if error.retry_after_seconds is None or not tries_left:
                    _log_unposted(body, error)
                    return
                await asyncio.sleep(min(error.retry_after_seconds, MOMENT_SECONDS))


def _log_unposted(body: Mapping[str, Any], why: object) -> None:
    about = body["involvedObject"]
    whose = about["namespace"], about["name"]
    _log.warning("Event %s of %s/%s could not be posted: %s", body["reason"], *whose, why)


def _body(job: Mapping[str, Any], event: Event, now: datetime) -> dict[str, Any]:
    metadata = job["metadata"]
    message = event.message if len(event.message) <= MESSAGE_LIMIT else event.message[: MESSAGE_LIMIT - 1] + "…"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
        "type": event.type,
        "reason": event.reason,
        "message": message,
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "firstTimestamp": rfc3339(now),
        "lastTimestamp": rfc3339(now),
        "count": 1,
    }
