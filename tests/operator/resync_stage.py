"""A resync on an API server that can only be listed, with time made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from finetune_operator.cache import Cache
from finetune_operator.errors import ApiError, api_error
from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.queue import Key
from finetune_operator.resync import Resync
from finetune_operator.serving.health import Heartbeat
from tests.operator.jumping_loop import JumpingLoop
from tests.operator.raw import job

T = TypeVar("T")
Raw = dict[str, Any]


class Listed:
    """An API server that can be listed."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Raw]] = {FINETUNE_PLURAL: [], PYTORCH_PLURAL: [], PODS_PLURAL: []}
        self.errors: dict[str | None, ApiError] = {}
        """By namespace."""
        self.pages = 0
        self.page_seconds = 0.0
        """Time that a page takes."""
        self.keeps_place_seconds = float("inf")
        """After this long a list cannot be gone on with."""
        self.deleted: list[str] = []
        self.next_job: list[Raw | ApiError] = []
        """What comes in place of the next jobs that are read."""
        self.next_deletion: list[ApiError] = []
        """Likewise of deletions."""

    async def list_metadata(self, kind: str, namespace: str | None) -> AsyncIterator[list[Raw]]:
        """As Cluster's, two objects a page."""
        if namespace in self.errors:
            raise self.errors[namespace]
        found = [raw for raw in self.objects[kind] if namespace in (None, raw["metadata"]["namespace"])]
        clock = asyncio.get_running_loop().time
        begun = clock()
        for start in range(0, max(1, len(found)), 2):
            await asyncio.sleep(self.page_seconds)
            if clock() - begun > self.keeps_place_seconds:
                raise api_error(410, "Expired", "The provided continue parameter is too old.")
            self.pages += 1
            yield [{"metadata": raw["metadata"]} for raw in found[start : start + 2]]

    async def get_job(self, namespace: str, name: str) -> Raw | None:
        """As Cluster's."""
        if self.next_job:
            instead = self.next_job.pop(0)
            if isinstance(instead, ApiError):
                raise instead
            return instead
        of_that_name = (raw for raw in self.objects[FINETUNE_PLURAL] if raw["metadata"]["name"] == name)
        return next((raw for raw in of_that_name if raw["metadata"]["namespace"] == namespace), None)

    async def delete_pytorch_job(self, namespace: str, name: str, *, uid: str) -> None:
        """As Cluster's."""
        if self.next_deletion:
            raise self.next_deletion.pop(0)
        self.deleted.append(name)


class Stage:
    """A resync, what it lists, and what it asked for."""

    def __init__(self, *namespaces: str, period_seconds: float = 300) -> None:
        self.server, self.cache = Listed(), Cache()
        self.cache.synced = True
        self.added: list[Key] = []
        self.heartbeat = Heartbeat(period_seconds)
        self.resync = Resync(
            self.server,  # type: ignore[arg-type]
            namespaces or (None,),
            period_seconds=period_seconds,
            queue=self,  # type: ignore[arg-type]
            cache=self.cache,
            heartbeat=self.heartbeat,
        )

    def add(self, key: Key) -> None:
        """As WorkQueue's."""
        self.added.append(key)

    def once(self, *meanwhile: Coroutine[Any, Any, None]) -> bool:
        """Resync, while something else happens; time is made up."""

        async def run() -> bool:
            done, *_ = await asyncio.gather(self.resync.once(), *meanwhile)
            return bool(done)

        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            return runner.run(run())

    def live(self, meanwhile: Coroutine[Any, Any, T]) -> T:
        """Resync now and then, as long as something else happens; time is made up."""

        async def run() -> T:
            task = asyncio.create_task(self.resync.run())
            try:
                return await meanwhile
            finally:
                task.cancel()

        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            return runner.run(run())


def running(version: str = "7") -> Raw:
    """A job whose first attempt is open."""
    return job({"phase": "Running", "attempt": 1, "observedGeneration": 1}, version=version)


def known(stage: Stage, raw: Raw) -> None:
    """The watch has told of a job, and a reconcile was made of it."""
    cached = stage.cache.job_read(raw)
    cached.newest_attempt = raw["status"].get("attempt")
