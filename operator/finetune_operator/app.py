"""The operator's process: everything is made here once, put together, and runs until it is told to stop.

When one part dies, all end and the process exits with an error: Kubernetes starts a new one, which finds in the
cluster whatever this one knew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry

from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError
from finetune_operator.handlers import registry, watch
from finetune_operator.health import Heartbeat, health_app
from finetune_operator.http_servers import counted, listening
from finetune_operator.memory import Memory
from finetune_operator.metrics import Metrics, metrics_app
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.endpoint import ServerCertificate, endpoint_hosts, progress_endpoint
from finetune_operator.progress.inbox import Inbox
from finetune_operator.progress.tokens import TokenAuthorizer
from finetune_operator.progress_server import progress_app
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.reconcile import Reconciler
from finetune_operator.resync import Dispatcher, Resync
from finetune_operator.settings import OperatorSettings

SETTLE_SECONDS = 0.2
"""Least time between two looks at one job (seconds): one change comes with several events."""
KIND_CHECK_SECONDS = 5.0
"""Time between two looks whether the PyTorchJob kind has been installed meanwhile (seconds)."""

_log = logging.getLogger(__name__)


class Operator:
    """All parts of the operator, around one connection to the API server."""

    def __init__(self, cluster: Cluster, settings: OperatorSettings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._memory = Memory()
        self._heartbeat = Heartbeat(settings.resync_seconds)
        self._queue = WorkQueue(self._look, concurrency=settings.concurrency, settle_seconds=SETTLE_SECONDS)
        self._metrics = Metrics(CollectorRegistry(), queue_depth=self._queue.depth)
        self._inbox = Inbox(
            lambda namespace, name: self._queue.add(Key(namespace, name)),
            interval_seconds=settings.status_interval_seconds,
        )
        self._authority = CertificateAuthority(
            cluster,
            namespace=settings.namespace,
            secret=settings.tls_secret,
            config_map=settings.ca_config_map,
        )
        self._reconciler = Reconciler(
            cluster,
            settings,
            memory=self._memory,
            inbox=self._inbox,
            authority=self._authority if settings.progress_url else None,
            metrics=self._metrics,
        )
        self._dispatcher = Dispatcher(self._queue, self._memory)
        self._resync = Resync(
            cluster,
            settings.watch_namespaces or (None,),
            period_seconds=settings.resync_seconds,
            dispatcher=self._dispatcher,
            queue=self._queue,
            memory=self._memory,
            heartbeat=self._heartbeat,
        )
        self._open = False

    async def run(self) -> None:
        """Run until a signal comes.

        Raises:
            Exception: a part died.
        """
        async with self._servers(), asyncio.TaskGroup() as parts:
            tasks = [parts.create_task(self._queue.run()), parts.create_task(self._resync.run())]
            await self._watch()
            for task in tasks:
                task.cancel()

    async def _look(self, key: Key) -> float | None:
        return await self._reconciler.look(key)

    def _forget(self, key: Key) -> None:
        self._reconciler.forget(key)
        self._queue.forget(key)

    def _count_jobs(self) -> None:
        self._metrics.set_jobs(self._memory.phases())
        self._metrics.set_gpus(self._memory.gpus())

    async def _watch(self) -> None:
        """Watch until a signal comes; from the start again once the PyTorchJob kind appears, which kopf cannot see."""
        handlers = registry(
            self._dispatcher,
            self._memory,
            self._heartbeat,
            forget=self._forget,
            credentials=self._cluster.credentials,
        )
        while True:
            appeared, stop = asyncio.Event(), asyncio.Event()
            appearance = asyncio.create_task(self._stop_when_kind_appears(appeared, stop))
            try:
                await watch(handlers, self._settings.watch_namespaces, stop, asyncio.Event())
            finally:
                appearance.cancel()
            if not appeared.is_set():
                return
            _log.info("The PyTorchJob kind was installed: watching it from now on.")

    async def _stop_when_kind_appears(self, appeared: asyncio.Event, stop: asyncio.Event) -> None:
        was_missing = False
        while True:
            try:
                is_there = await self._cluster.has_pytorch_jobs()
            except ApiError:
                is_there = not was_missing
            if is_there and was_missing:
                appeared.set()
                stop.set()
            if is_there:
                return
            if not was_missing:
                _log.warning("The cluster has no PyTorchJob kind: jobs wait until the training operator is installed.")
            was_missing = True
            await asyncio.sleep(KIND_CHECK_SECONDS)

    @asynccontextmanager
    async def _servers(self) -> AsyncIterator[None]:
        settings = self._settings
        async with AsyncExitStack() as stack:
            health = health_app(self._heartbeat, lambda: self._open)
            metrics = metrics_app(self._metrics, refresh=self._count_jobs)
            await stack.enter_async_context(listening(health, "", settings.health_port))
            await stack.enter_async_context(listening(metrics, "", settings.metrics_port))
            if settings.progress_url:
                await stack.enter_async_context(self._progress())
            self._open = True
            yield
            self._open = False

    @asynccontextmanager
    async def _progress(self) -> AsyncIterator[None]:
        settings = self._settings
        authorize = TokenAuthorizer(self._cluster, self._memory.current_attempt, audience=settings.progress_audience)
        app: web.Application = counted(progress_app(authorize, self._inbox.deliver), self._metrics.report_answered)
        certificate = ServerCertificate(self._authority, endpoint_hosts(settings.progress_url, settings.namespace))
        async with progress_endpoint(app, certificate, settings.progress_host, settings.progress_port):
            yield


async def run_operator(settings: OperatorSettings) -> None:
    """Connect to the API server and run until a signal comes."""
    async with await Cluster.connect() as cluster:
        await Operator(cluster, settings).run()
