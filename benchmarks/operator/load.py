"""Creates FineTuneJobs and notes when a watcher sees each of them and its PyTorchJob.

Both are seen by the same process through the same kind of watch, which carries metadata alone, so that what the watch
itself costs is the same on either side and small.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from finetune_operator.names import JOB_NAME_LABEL
from tests.cluster.control_plane import ControlPlane
from tests.cluster.scene import manifest

SENDERS = 16
"""Creations that are on their way at the same time when jobs are to be created at once."""
CONNECTIONS = 64
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
WATCH_SECONDS = 3600
WATCHES_SECONDS = 0.5
"""Time that both watches have to begin, before the first job is created."""
LINE_BYTES = 2**20

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/{}/finetunejobs"
PYTORCH_JOBS = "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs"


class LoadError(RuntimeError):
    """The load could not be brought about; the text says why."""


@dataclass
class Timeline:
    """When things happened to each job (monotonic seconds), by its name."""

    sent: dict[str, float] = field(default_factory=dict)
    answered: dict[str, float] = field(default_factory=dict)
    """The API server had accepted it."""
    job_seen: dict[str, float] = field(default_factory=dict)
    child_seen: dict[str, float] = field(default_factory=dict)

    def latencies(self) -> list[float]:
        """Seconds from a job's ADDED to its PyTorchJob's."""
        return [seen - self.job_seen[name] for name, seen in self.child_seen.items()]

    @property
    def create_seconds(self) -> float:
        """From the first creation sent to the last one accepted."""
        return max(self.answered.values()) - min(self.sent.values())

    @property
    def drain_seconds(self) -> float:
        """From the first creation sent until the last PyTorchJob was seen."""
        return max(self.child_seen.values()) - min(self.sent.values())

    @property
    def lag_seconds(self) -> float:
        """From the last creation accepted until the last PyTorchJob was seen."""
        return max(self.child_seen.values()) - max(self.answered.values())


@dataclass(frozen=True)
class Client:
    """A connection to the API server as an administrator, which its priorities and fairness exempt."""

    session: aiohttp.ClientSession

    async def create(self, namespace: str, name: str, timeline: Timeline) -> None:
        """Create one job."""
        body = orjson.dumps(manifest(name))
        timeline.sent[name] = time.monotonic()
        headers = {"Content-Type": "application/json"}
        async with self.session.post(JOBS.format(namespace), data=body, headers=headers) as answer:
            text = await answer.read()
        if answer.status != 201:
            raise LoadError(f"A job was not accepted: {text[:500].decode(errors='replace')}")
        timeline.answered[name] = time.monotonic()

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create any object; what the server has made of it."""
        headers = {"Content-Type": "application/json"}
        async with self.session.post(path, data=orjson.dumps(body), headers=headers) as answer:
            text = await answer.read()
        if answer.status != 201:
            raise LoadError(f"{path}: {text[:500].decode(errors='replace')}")
        made: dict[str, Any] = orjson.loads(text)
        return made

    async def merge(self, path: str, body: Mapping[str, Any]) -> None:
        """JSON merge patch."""
        headers = {"Content-Type": "application/merge-patch+json"}
        async with self.session.patch(path, data=orjson.dumps(body), headers=headers) as answer:
            if answer.status >= 400:
                raise LoadError(f"{path}: {(await answer.read())[:500].decode(errors='replace')}")

    async def list(self, path: str) -> dict[str, Any]:
        """The objects of a kind, as a list."""
        async with self.session.get(path) as answer:
            answer.raise_for_status()
            found: dict[str, Any] = orjson.loads(await answer.read())
            return found

    async def note_added(
        self, path: str, seen: dict[str, float], name_of: Callable[[dict[str, Any]], str], count: int
    ) -> None:
        """Note when `count` objects that are new from now on were added below `path`, by a name from their metadata.

        Raises:
            LoadError: events were missed.
        """
        version = (await self.list(path))["metadata"]["resourceVersion"]
        query = {"watch": "true", "timeoutSeconds": str(WATCH_SECONDS)}
        while True:
            # The server closes watches as it likes, above all those of clients that had no CPU to read with.
            async with self.session.get(
                path, params={**query, "resourceVersion": version}, headers={"Accept": METADATA_ONLY}
            ) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    now = time.monotonic()
                    event = orjson.loads(line)
                    if event["type"] == "ERROR":
                        raise LoadError(f"The watch of {path} broke: {event['object']}")
                    metadata = event["object"]["metadata"]
                    version = metadata["resourceVersion"]
                    if event["type"] == "ADDED":
                        seen.setdefault(name_of(metadata), now)
                        if len(seen) == count:
                            return


@asynccontextmanager
async def connect(plane: ControlPlane) -> AsyncIterator[Client]:
    """A client of a control plane."""
    async with aiohttp.ClientSession(
        plane.url,
        headers={"Authorization": plane.api.http.headers["Authorization"]},
        connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=ssl.create_default_context(cafile=str(plane.ca_file))),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        read_bufsize=LINE_BYTES,
    ) as session:
        yield Client(session)


async def run_load(
    plane: ControlPlane, namespace: str, names: Sequence[str], *, per_second: float | None, timeout_seconds: float
) -> Timeline:
    """Create jobs and return when each has its PyTorchJob.

    Args:
        plane: where.
        namespace: where, again; it must hold no jobs of these names.
        names: of the jobs.
        per_second: rate of creation; None for as fast as the API server takes them.
        timeout_seconds: time for all of it.

    Raises:
        LoadError: jobs were refused, or PyTorchJobs were missing at the end.
    """
    timeline, count = Timeline(), len(names)
    async with connect(plane) as client:
        try:
            async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as group:
                group.create_task(
                    client.note_added(JOBS.format(namespace), timeline.job_seen, lambda data: str(data["name"]), count)
                )
                group.create_task(
                    client.note_added(
                        PYTORCH_JOBS.format(namespace),
                        timeline.child_seen,
                        lambda data: str(data["labels"][JOB_NAME_LABEL]),
                        count,
                    )
                )
                await asyncio.sleep(WATCHES_SECONDS)
                group.create_task(_create_all(client, namespace, names, timeline, per_second))
        except TimeoutError:
            missing = count - len(timeline.child_seen)
            raise LoadError(f"{missing} PyTorchJobs were missing after {timeout_seconds:.0f} s.") from None
        except ExceptionGroup as failed:
            raise LoadError("; ".join(map(repr, failed.exceptions))) from failed
    return timeline


async def _create_all(
    client: Client, namespace: str, names: Sequence[str], timeline: Timeline, per_second: float | None
) -> None:
    slots = asyncio.Semaphore(SENDERS if per_second is None else CONNECTIONS)

    async def create(name: str) -> None:
        try:
            await client.create(namespace, name, timeline)
        finally:
            slots.release()

    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(names):
            if per_second is not None:
                await asyncio.sleep(begin + number / per_second - time.monotonic())
            await slots.acquire()
            group.create_task(create(name))


async def in_parallel(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run requests, as many at the same time as there are senders."""
    slots = asyncio.Semaphore(SENDERS)

    async def run(call: Coroutine[Any, Any, None]) -> None:
        async with slots:
            await call

    await asyncio.gather(*(run(call) for call in calls))
