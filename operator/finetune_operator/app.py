"""The operator's process: everything is made here once, put together, and runs until it is told to stop.

When one part dies, all end and the process exits with an error: Kubernetes starts a new one, which finds in the
cluster whatever this one knew.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

from aiohttp import web
from prometheus_client import CollectorRegistry

from finetune_operator.cache import Cache
from finetune_operator.cluster import Cluster
from finetune_operator.dispatch import Dispatcher
from finetune_operator.errors import ApiError, SetupProblem
from finetune_operator.events import EventBroadcaster
from finetune_operator.handlers import watch
from finetune_operator.progress.app import progress_app
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.endpoint import ServerCertificate, endpoint_hosts, progress_endpoint
from finetune_operator.progress.inbox import Inbox
from finetune_operator.progress.tokens import TokenAuthorizer
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.reconcile import Reconciler
from finetune_operator.resync import Resync
from finetune_operator.serving.answers import counted
from finetune_operator.serving.health import Heartbeat, health_app
from finetune_operator.serving.metrics import Metrics, metrics_app
from finetune_operator.serving.port import listening
from finetune_operator.settings import OperatorSettings

SETTLE_SECONDS = 0.2
"""Least time between two reconciles of one job (seconds): one change comes with several events."""
PROGRESS_RETRY_SECONDS = 10.0
"""Wait after the progress endpoint could not be served (seconds)."""
TRUST_SECONDS = 60.0
"""Time between two checks whether all jobs that run can trust the progress endpoint (seconds)."""
KIND_CHECK_SECONDS = 5.0
"""Time between two checks whether a kind that was missing has been installed meanwhile (seconds)."""

_log = logging.getLogger(__name__)


class Operator:
    """All parts of the operator, around one connection to the API server."""

    def __init__(self, cluster: Cluster, settings: OperatorSettings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._heartbeat = Heartbeat(settings.resync_seconds)
        self._queue = WorkQueue(
            lambda key: self._reconciler.reconcile(key),
            concurrency=settings.concurrency,
            settle_seconds=SETTLE_SECONDS,
            is_known=lambda key: self._cache.find(key) is not None,
        )
        self._metrics = Metrics(CollectorRegistry(), queue_depth=self._queue.depth)
        self._inbox = Inbox(
            lambda namespace, name: self._queue.add(Key(namespace, name)),
            interval_seconds=settings.status_interval_seconds,
        )
        self._cache = Cache(self._inbox.forget)
        self._authority = CertificateAuthority(
            cluster,
            namespace=settings.namespace,
            secret=settings.tls_secret,
            config_map=settings.ca_config_map,
        )
        self._events = EventBroadcaster(cluster)
        self._reconciler = Reconciler(
            cluster,
            settings,
            cache=self._cache,
            inbox=self._inbox,
            authority=self._authority if settings.progress_url else None,
            metrics=self._metrics,
            events=self._events,
        )
        self._dispatcher = Dispatcher(self._queue, self._cache, self._heartbeat, forget=self._reconciler.forget)
        self._resync = Resync(
            cluster,
            settings.watch_namespaces or (None,),
            period_seconds=settings.resync_seconds,
            queue=self._queue,
            cache=self._cache,
            heartbeat=self._heartbeat,
            # What twenty thousand jobs leave in the cache stays. A pass of the collector over it keeps the event loop.
            synced=gc.freeze,
        )
        self._open = False

    async def run(self) -> None:
        """Run until a signal comes.

        Raises:
            Exception: a part died.
        """
        async with self._servers(), asyncio.TaskGroup() as parts:
            works = [self._queue.run(), self._resync.run()]
            if self._settings.progress_url:
                works += [self._serve_progress(), self._keep_trusted()]
            broadcast = parts.create_task(self._events.run())
            tasks = [parts.create_task(work) for work in works]
            await self._watch()
            for task in tasks:
                task.cancel()
            await self._events.flush()
            broadcast.cancel()

    def _refresh_metrics(self) -> None:
        self._metrics.set_jobs(self._cache.phases())
        self._metrics.set_gpus(self._cache.gpus())
        self._metrics.set_longest_waits(self._cache.longest_waits(datetime.now(UTC)))
        self._metrics.set_in_sync(self._heartbeat.ready and self._heartbeat.problem() is None)

    async def _watch(self) -> None:
        """Watch until a signal comes; anew once a kind appears that was missing, which kopf cannot see."""
        while True:
            appeared, stop = asyncio.Event(), asyncio.Event()
            appearance = asyncio.create_task(self._stop_when_kind_appears(appeared, stop))
            try:
                await watch(
                    self._cluster,
                    self._dispatcher.seen,
                    self._settings.watch_namespaces,
                    stop,
                    tells=self._resync.watch_tells,
                    begun=self._resync.watch_begun,
                    lists_again=self._resync.soon,
                )
            finally:
                appearance.cancel()
            if not appeared.is_set():
                return
            _log.info("A kind that was missing is installed: watching it from now on.")

    async def _stop_when_kind_appears(self, appeared: asyncio.Event, stop: asyncio.Event) -> None:
        missing: set[str] = set()
        while True:
            try:
                still_missing = await self._cluster.missing_kinds()
            except ApiError as error:
                _log.warning("It cannot be told which kinds are installed: %s", error)
            else:
                if missing - still_missing:
                    appeared.set()
                    stop.set()
                if not still_missing or stop.is_set():
                    return
                if not missing:
                    _log.warning("The cluster does not know %s: jobs wait until it does.", " and ".join(still_missing))
                missing = still_missing
            await asyncio.sleep(KIND_CHECK_SECONDS)

    @asynccontextmanager
    async def _servers(self) -> AsyncIterator[None]:
        settings = self._settings
        async with AsyncExitStack() as stack:
            health = health_app(self._heartbeat, lambda: self._open)
            metrics = metrics_app(self._metrics, refresh=self._refresh_metrics)
            await stack.enter_async_context(listening(health, "", settings.health_port))
            await stack.enter_async_context(listening(metrics, "", settings.metrics_port))
            self._open = not settings.progress_url
            yield

    async def _serve_progress(self) -> None:
        """Serve the progress endpoint for ever, as soon as that can be done: jobs train without it, too."""
        settings = self._settings
        authorize = TokenAuthorizer(
            self._cluster,
            self._cache.current_attempt,
            audience=settings.progress_audience,
            expects_pod=self._cache.expects,
        )
        certificate = ServerCertificate(self._authority, endpoint_hosts(settings.progress_url, settings.namespace))
        while True:
            app: web.Application = counted(progress_app(authorize, self._inbox.deliver), self._metrics.report_answered)
            try:
                async with progress_endpoint(app, certificate, settings.progress_host, settings.progress_port):
                    self._open = True
                    await asyncio.Event().wait()
            except (ApiError, SetupProblem) as error:
                _log.error("The progress endpoint cannot be served, so jobs show no progress; next try soon: %s", error)
                await asyncio.sleep(PROGRESS_RETRY_SECONDS)

    async def _keep_trusted(self) -> None:
        """See to it for ever that jobs which run trust this installation, a new one too."""
        while True:
            await asyncio.sleep(min(TRUST_SECONDS, self._settings.resync_seconds))
            await self._authority.ensure_everywhere(self._cache.open_namespaces())


async def run_operator(settings: OperatorSettings) -> None:
    """Connect to the API server and run until a signal comes."""
    async with await Cluster.connect() as cluster:
        await Operator(cluster, settings).run()
