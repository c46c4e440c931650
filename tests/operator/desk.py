"""A reconciler with nothing around it: one reconcile at a time, by hand, on the simulated API server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from prometheus_client import CollectorRegistry

from finetune_operator.cache import Cache, CachedJob
from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError
from finetune_operator.events import EventBroadcaster
from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.progress.inbox import Inbox
from finetune_operator.queue import Key
from finetune_operator.reconcile import (
    Reconciler,
)
from finetune_operator.serving.metrics import Metrics
from finetune_operator.settings import OperatorSettings
from finetune_operator.wire import Raw
from tests.operator.simulation.actors import Kubelet, TrainingOperator
from tests.operator.simulation.author import NAME, manifest
from tests.operator.simulation.clients import NAMESPACE, Client, is_going
from tests.operator.simulation.server import SimulatedServer
from tests.operator.simulation.wire import SimulatedWire

KEY = Key(NAMESPACE, NAME)
Refuse = Callable[[str, str], ApiError | None]
"""Of a request's method and path: how it is refused."""


class RefusingWire(SimulatedWire):
    """Some requests are refused."""

    refuse: Refuse = staticmethod(lambda method, path: None)

    async def request(self, method: str, path: str, **more: Any) -> Raw:
        """As Wire's."""
        error = self.refuse(method, path)
        if error is not None:
            raise error
        return await super().request(method, path, **more)


class Desk:
    """A reconciler, its cluster, and a clock that stands still."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 31, 12, tzinfo=UTC)
        self.client = Client(SimulatedServer(self.now))
        self.training_operator = TrainingOperator(self.client, self.now)
        self.kubelet = Kubelet(self.client, self.now)
        self.wire = RefusingWire(self.client.server, 1)
        self.registry = CollectorRegistry()
        self.inbox = Inbox(lambda *_: None, interval_seconds=0, now=self.now)
        self.cache = Cache(self.inbox.forget)
        self.cache.synced = True
        self.children: dict[str, dict[str, Raw]] = {}
        """What the watches have told of: by kind and uid."""
        cluster = Cluster(self.wire)
        self.reconciler = Reconciler(
            cluster,
            OperatorSettings(default_output_uri="s3://models/team", progress_url="https://operator:8443"),
            cache=self.cache,
            inbox=self.inbox,
            authority=None,
            metrics=Metrics(self.registry),
            events=EventBroadcaster(cluster),
            now=self.now,
        )

    def now(self) -> datetime:
        """The time."""
        return self.time

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.time += timedelta(seconds=seconds)

    def apply(self, **spec: Any) -> Raw:
        """The job as its author made it."""
        return self.client.create(FINETUNE_PLURAL, manifest(**spec))

    def cached(self) -> CachedJob:
        """What is kept of the job."""
        found = self.cache.find(KEY)
        assert found is not None
        return found

    def job(self) -> Raw:
        """The job as it is."""
        (found,) = self.client.find(FINETUNE_PLURAL)
        return found

    def reason(self) -> tuple[str, str]:
        """Of the condition Succeeded: reason and message."""
        succeeded = next(item for item in self.job()["status"]["conditions"] if item["type"] == "Succeeded")
        return succeeded["reason"], succeeded["message"]

    def pods(self) -> list[Raw]:
        """All pods, those of this attempt last."""
        return self.client.find(PODS_PLURAL)

    def confirm(self) -> None:
        """Pods that are on their way out are gone."""
        for pod in filter(is_going, self.pods()):
            self.kubelet.confirm(pod)

    def reconcile(self) -> float | None:
        """The watches tell of everything, and a reconcile is made of it; after how many seconds the next one."""
        for raw in self.client.find(FINETUNE_PLURAL):
            self.cache.job_seen(raw)
        for plural in (PYTORCH_PLURAL, PODS_PLURAL):
            now = {raw["metadata"]["uid"]: raw for raw in self.client.find(plural)}
            for uid, raw in self.children.pop(plural, {}).items():
                if uid not in now:
                    self.cache.child_seen(plural, raw, deleted=True)
            for raw in now.values():
                self.cache.child_seen(plural, raw, deleted=False)
            self.children[plural] = now
        return asyncio.run(self.reconciler.reconcile(KEY))

    def settle(self) -> None:
        """Everybody does what there is to be done now."""
        for _ in range(8):
            self.training_operator.work()
            self.reconcile()
            self.client.server.collect()

    def counted(self, result: str) -> float:
        """Reconciles that ended so."""
        return self.registry.get_sample_value("finetune_reconcile_total", {"result": result}) or 0.0


def always(method: str, part: str, error: ApiError) -> Refuse:
    """Refuse requests of that method whose path has that part."""
    return lambda asked, path: error if asked == method and part in path else None
