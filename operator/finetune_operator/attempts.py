"""Reads, creates and releases the objects of one attempt. What is ours is told by its owner's uid, not its name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from finetune_api.job import FineTuneJob
from finetune_operator.cache import Cache, CachedJob
from finetune_operator.children import is_calm
from finetune_operator.cluster import Cluster
from finetune_operator.desired import job_config_map, pytorch_job, same_placement, same_training
from finetune_operator.desired.continuation import continued
from finetune_operator.desired.fingerprint import is_edited
from finetune_operator.errors import ApiError, Conflict
from finetune_operator.names import (
    ATTEMPT_LABEL,
    JOB_UID_LABEL,
    PLACEMENT_KEY,
    PODS_PLURAL,
    PYTORCH_PLURAL,
    SPEC_KEY,
    child_name,
    pod_name,
)
from finetune_operator.policy.observed import (
    PYTORCH_KIND,
    PodView,
    PyTorchJobView,
    is_made_by,
    is_owned,
    read_pod,
    read_pytorch_job,
)
from finetune_operator.policy.refusals import PYTORCH_JOB
from finetune_operator.settings import OperatorSettings
from finetune_operator.wire import Raw

FEW_PODS = 8
"""Up to so many pods are read one by one: a list makes the API server look at every pod of the namespace."""
CONFIG_MAP = "ConfigMap"


class _Worker(NamedTuple):
    """What has the labels and the name of a worker's pod."""

    view: PodView
    is_by_name: bool
    """Whether a PyTorchJob of the attempt's name controls it, whatever its uid."""


class NameTaken(Exception):  # noqa: N818  the condition reason that it becomes
    """An object of somebody else's has the name that an attempt's object must have; the text is a sentence."""


class Attempts:
    """The objects of attempts in the cluster, and what the cache holds of them."""

    def __init__(self, cluster: Cluster, settings: OperatorSettings, cache: Cache) -> None:
        self._cluster = cluster
        self._settings = settings
        self._cache = cache

    async def read(
        self, cached: CachedJob, attempt: int, *, pods_of_finished: bool = True
    ) -> tuple[PyTorchJobView | None, Sequence[PodView]]:
        """The PyTorchJob of an attempt, if there is one of ours, and its pods, read from the API server.

        Pods are read first: whoever suspends a PyTorchJob does so before its pods go, so what is seen of a pod is
        never older than the reason for it.

        Args:
            cached: the job.
            attempt: number of the attempt.
            pods_of_finished: False reads pods only where there is a PyTorchJob.
        """
        name = child_name(cached.key.name, cached.uid, attempt)
        children = self._cache.children(cached.key, cached.uid)
        doubts = children.doubts

        async def pytorch_job() -> PyTorchJobView | None:
            raw = await self._pytorch_job(cached, name)
            if raw is not None and children.doubts == doubts:
                children.seen(PYTORCH_PLURAL, raw)
            return read_pytorch_job(raw, attempt, edited=is_edited(raw)) if raw is not None else None

        pods: Sequence[_Worker] = ()
        if pods_of_finished:
            pods = await self._pods(cached, name, attempt)
            found = await pytorch_job()
        else:
            found = await pytorch_job()
            if found is not None:
                pods = await self._pods(cached, name, attempt)
        views = [pod.view for pod in pods if _is_of(pod, found, cached, attempt)]
        if not is_calm(found, views):
            children.doubts += 1
        elif children.doubts == doubts:
            children.settled = doubts
        # else something ended while this was read, which may show it as it was before.
        return found, views

    def note_pod(self, cached: CachedJob, raw: Raw, view: PodView) -> None:
        """Keep a pod of a job, read just now, if it lives: what is known as it is listed is not read again."""
        if view.holds_machine:
            self._cache.children(cached.key, cached.uid).seen(PODS_PLURAL, raw)

    async def find(self, cached: CachedJob, attempt: int) -> PyTorchJobView | None:
        """The PyTorchJob of an attempt, if there is one of ours."""
        raw = await self._pytorch_job(cached, child_name(cached.key.name, cached.uid, attempt))
        return read_pytorch_job(raw, attempt, edited=is_edited(raw)) if raw is not None else None

    async def create(
        self, job: FineTuneJob, cached: CachedJob, attempt: int, *, avoid: Sequence[str], live: bool
    ) -> PyTorchJobView:
        """Create ConfigMap and PyTorchJob of an attempt, or find that they were.

        Args:
            job: as its author wrote it.
            cached: the same job.
            attempt: number of the attempt.
            avoid: names of nodes that its pods had better not run on.
            live: whether the job was read just now. What a watch told may be old: where the ConfigMap is there
                already, an operator was here before, and the job has to be read.

        Raises:
            NameTaken: somebody else's object is in the way.
            Conflict: read the job and decide anew.
            ApiError: the API server refuses or does not answer; its `kind` says which object.
        """
        if attempt > 1:
            job = continued(job, await self.first_config_map(cached))
        with _creating(CONFIG_MAP):
            await self._create_config_map(job, cached, attempt, live=live)
        body = pytorch_job(job, attempt, self._settings, avoid)
        namespace, name = cached.key.namespace, body["metadata"]["name"]
        with _creating(PYTORCH_JOB):
            try:
                made = await self._cluster.create_pytorch_job(namespace, body)
            except Conflict:
                found = await self._cluster.get_pytorch_job(namespace, name)
                if found is None:
                    raise
                if not is_owned(found, cached.uid):
                    raise name_taken(PYTORCH_JOB, namespace, name) from None
                self._cache.children(cached.key, cached.uid).seen(PYTORCH_PLURAL, found)
                return read_pytorch_job(found, attempt, edited=is_edited(found))
        view = self._cache.children(cached.key, cached.uid).made(made)
        return view if view is not None else read_pytorch_job(made, attempt)

    async def release(
        self, cached: CachedJob, attempt: int, pytorch_job: PyTorchJobView | None, *, keep_config_map: bool = False
    ) -> None:
        """Delete what an attempt holds. The first attempt's ConfigMap stays: it says what is trained."""
        namespace = cached.key.namespace
        name = child_name(cached.key.name, cached.uid, attempt)
        if attempt > 1 and not keep_config_map:
            found = await self._cluster.get_config_map(namespace, name)
            if found is not None and is_owned(found, cached.uid):
                await self._cluster.delete_config_map(namespace, name, uid=found["metadata"]["uid"])
        if pytorch_job is not None:
            await self._cluster.delete_pytorch_job(namespace, name, uid=pytorch_job.uid)
            self._cache.children(cached.key, cached.uid).forget(name)

    async def first_config_map(self, cached: CachedJob) -> Raw | None:
        """The ConfigMap of the first attempt, if it is there and ours."""
        return await self.config_map(cached, 1)

    async def changes(self, job: FineTuneJob, cached: CachedJob, attempt: int) -> tuple[bool, bool]:
        """Whether what is trained is no longer what the first attempt was made of, and whether where it runs is no
        longer what attempt number `attempt` was made of."""
        first = await self.first_config_map(cached)
        trained, placed = _recorded(first, SPEC_KEY), _recorded(first, PLACEMENT_KEY)
        del first  # somebody may have filled it
        if attempt != 1:
            placed = _recorded(await self.config_map(cached, attempt), PLACEMENT_KEY)
        return not same_training(trained, job), not same_placement(placed, job)

    async def config_map(self, cached: CachedJob, attempt: int) -> Raw | None:
        """The ConfigMap of an attempt, if there is one of ours."""
        name = child_name(cached.key.name, cached.uid, attempt)
        found = await self._cluster.get_config_map(cached.key.namespace, name)
        return found if found is not None and is_owned(found, cached.uid) else None

    async def _create_config_map(self, job: FineTuneJob, cached: CachedJob, attempt: int, *, live: bool) -> None:
        body = job_config_map(job, attempt, self._settings)
        namespace, name = cached.key.namespace, body["metadata"]["name"]
        try:
            await self._cluster.create_config_map(namespace, body)
            return
        except Conflict:
            if not live:
                raise
            found = await self._cluster.get_config_map(namespace, name)
        if found is None:
            raise Conflict(409, "Conflict", f"ConfigMap {name} came and went.")
        if not is_owned(found, cached.uid):
            raise name_taken(CONFIG_MAP, namespace, name)
        if found.get("data") != body["data"] and await self._cluster.get_pytorch_job(namespace, name) is None:
            # Left by an operator that was stopped before it made the PyTorchJob; the spec has changed since.
            await self._cluster.delete_config_map(namespace, name, uid=found["metadata"]["uid"])
            raise Conflict(409, "Conflict", f"ConfigMap {name} was out of date and is made anew.")

    async def _pytorch_job(self, cached: CachedJob, name: str) -> Raw | None:
        found = await self._cluster.get_pytorch_job(cached.key.namespace, name)
        return found if found is not None and is_owned(found, cached.uid) else None

    async def _pods(self, cached: CachedJob, name: str, attempt: int) -> Sequence[_Worker]:
        """What may be pods of an attempt, in their order. Anybody can label others as its own, of 1.4 MB each: none is
        kept as it was read, and none that has another name than a worker's."""
        namespace = cached.key.namespace
        doubts = self._cache.children(cached.key, cached.uid).doubts

        def viewed(raw: Raw | None) -> _Worker | None:
            if raw is None or not _belongs(raw, cached.uid, attempt, name):
                return None
            view = read_pod(raw)
            if self._cache.children(cached.key, cached.uid).doubts == doubts:  # else it may have ended meanwhile
                self.note_pod(cached, raw, view)
            return _Worker(view, is_made_by(raw, PYTORCH_KIND, name))

        async def asked(index: int) -> _Worker | None:
            return viewed(await self._cluster.get_pod(namespace, pod_name(name, index)))

        found: list[_Worker | None]
        size = cached.size[1] if cached.size is not None and cached.size[0] == attempt else None
        if size is not None and size <= FEW_PODS:
            found = await asyncio.gather(*(asked(index) for index in range(size)))
        else:
            listed = self._cluster.list_pods(namespace, job_uid=cached.uid, attempt=attempt)
            found = [worker async for raw in listed if (worker := viewed(raw)) is not None]
        return sorted((worker for worker in found if worker is not None), key=lambda worker: worker.view.index)


@contextmanager
def _creating(kind: str) -> Iterator[None]:
    """Errors say that it was an object of this kind that could not be created."""
    try:
        yield
    except ApiError as error:
        error.kind = kind
        raise


def _recorded(config_map: Mapping[str, Any] | None, key: str) -> str | None:
    data = (config_map or {}).get("data")
    return data.get(key) if isinstance(data, Mapping) else None


def _belongs(raw: Raw, uid: str, attempt: int, pytorch_job: str) -> bool:
    """Whether a pod may be a worker of the PyTorchJob of that name."""
    labels = raw["metadata"].get("labels") or {}
    if labels.get(JOB_UID_LABEL) != uid or labels.get(ATTEMPT_LABEL) != str(attempt):
        return False
    index = raw["metadata"]["name"].rpartition("-")[2]
    return len(index) < 5 and index.isdecimal() and raw["metadata"]["name"] == pod_name(pytorch_job, int(index))


def _is_of(pod: _Worker, owner: PyTorchJobView | None, cached: CachedJob, attempt: int) -> bool:
    """Whether a pod that wears an attempt's labels and a worker's name, which anybody can write, is one of its pods.

    Its PyTorchJob controls it, or controlled it before it went. An operator that has not seen that one, since it was
    started later, goes by its name. One whose owner was deleted without it has none any more, and the policies believe
    nothing that it says.
    """
    owner_uid = pod.view.owner_uid
    if owner is not None:
        return owner_uid == owner.uid
    if cached.workers is not None and cached.workers[0] == attempt and owner_uid:
        return owner_uid == cached.workers[1]
    return pod.is_by_name or not owner_uid


def name_taken(kind: str, namespace: str, name: str) -> NameTaken:
    """What somebody else's object of that name is reported by."""
    return NameTaken(
        f"The {kind} {namespace}/{name} belongs to somebody else and has the name that this job's must have: delete or "
        "rename it, and the job goes on by itself."
    )
