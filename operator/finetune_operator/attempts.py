"""Reads, creates and releases the objects of one attempt. What is ours is told by its owner's uid, not its name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_operator.cluster import Cluster
from finetune_operator.desired import immutable_spec, job_config_map, placement, pytorch_job
from finetune_operator.desired.continuation import continued
from finetune_operator.desired.fingerprint import is_edited
from finetune_operator.errors import Conflict
from finetune_operator.memory import Known
from finetune_operator.names import ATTEMPT_LABEL, JOB_UID_LABEL, PLACEMENT_KEY, SPEC_KEY, child_name, pod_name
from finetune_operator.policy.observed import PodView, PyTorchJobView, read_pod, read_pytorch_job
from finetune_operator.settings import OperatorSettings

FEW_PODS = 8
"""Up to so many pods are read one by one: a list makes the API server look at every pod of the namespace."""

Raw = dict[str, Any]


class NameTaken(Exception):  # noqa: N818  the condition reason that it becomes
    """An object of somebody else's has the name that an attempt's object must have; the text is a sentence."""


class Attempts:
    """The objects of attempts in the cluster."""

    def __init__(self, cluster: Cluster, settings: OperatorSettings) -> None:
        self._cluster = cluster
        self._settings = settings

    async def read(
        self, known: Known, attempt: int, *, pods_of_finished: bool = True
    ) -> tuple[PyTorchJobView | None, Sequence[PodView]]:
        """The PyTorchJob of an attempt, if there is one of ours, and its pods.

        Pods are read first: whoever suspends a PyTorchJob does so before its pods go, so what is seen of a pod is
        never older than the reason for it.

        Args:
            known: the job.
            attempt: number of the attempt.
            pods_of_finished: False reads pods only where there is a PyTorchJob.
        """
        name = child_name(known.key.name, known.uid, attempt)
        if not pods_of_finished:
            pytorch_job = await self._workers(known, name, attempt)
            return pytorch_job, await self._pods(known, name, attempt) if pytorch_job else ()
        pods = await self._pods(known, name, attempt)
        return await self._workers(known, name, attempt), pods

    async def find(self, known: Known, attempt: int) -> PyTorchJobView | None:
        """The PyTorchJob of an attempt, if there is one of ours."""
        return await self._workers(known, child_name(known.key.name, known.uid, attempt), attempt)

    async def create(self, job: FineTuneJob, known: Known, attempt: int) -> PyTorchJobView:
        """Create ConfigMap and PyTorchJob of an attempt, or find that they were.

        Raises:
            NameTaken: somebody else's object is in the way.
            ApiError: the API server refuses or does not answer.
        """
        if attempt > 1:
            job = continued(job, await self.first_config_map(known))
        await self._create_config_map(job, known, attempt)
        body = pytorch_job(job, attempt, self._settings)
        namespace, name = known.key.namespace, body["metadata"]["name"]
        try:
            made = await self._cluster.create_pytorch_job(namespace, body)
        except Conflict:
            found = await self._cluster.get_pytorch_job(namespace, name)
            if found is None:
                raise
            if not is_owned(found, known.uid):
                raise name_taken("PyTorchJob", namespace, name) from None
            made = found
        return read_pytorch_job(made, attempt, edited=is_edited(made))

    async def release(
        self, known: Known, attempt: int, pytorch_job: PyTorchJobView, *, keep_config_map: bool = False
    ) -> None:
        """Delete what an attempt holds. The first attempt's ConfigMap stays: it says what is trained."""
        namespace = known.key.namespace
        if attempt > 1 and not keep_config_map:
            found = await self._cluster.get_config_map(namespace, pytorch_job.name)
            if found is not None and is_owned(found, known.uid):
                await self._cluster.delete_config_map(namespace, pytorch_job.name, uid=found["metadata"]["uid"])
        await self._cluster.delete_pytorch_job(namespace, pytorch_job.name, uid=pytorch_job.uid)

    async def first_config_map(self, known: Known) -> Raw | None:
        """The ConfigMap of the first attempt, if it is there and ours."""
        return await self.config_map(known, 1)

    async def changes(self, job: FineTuneJob, known: Known, attempt: int) -> tuple[bool, bool]:
        """Whether what is trained is no longer what the first attempt was made of, and whether where it runs is no
        longer what attempt number `attempt` was made of."""
        first = await self.first_config_map(known)
        current = first if attempt == 1 else await self.config_map(known, attempt)
        return (
            _recorded(first, SPEC_KEY) not in (None, immutable_spec(job)),
            _recorded(current, PLACEMENT_KEY) not in (None, placement(job)),
        )

    async def config_map(self, known: Known, attempt: int) -> Raw | None:
        """The ConfigMap of an attempt, if there is one of ours."""
        name = child_name(known.key.name, known.uid, attempt)
        found = await self._cluster.get_config_map(known.key.namespace, name)
        return found if found is not None and is_owned(found, known.uid) else None

    async def _create_config_map(self, job: FineTuneJob, known: Known, attempt: int) -> None:
        body = job_config_map(job, attempt, self._settings)
        namespace, name = known.key.namespace, body["metadata"]["name"]
        try:
            await self._cluster.create_config_map(namespace, body)
            return
        except Conflict:
            found = await self._cluster.get_config_map(namespace, name)
        if found is None:
            raise Conflict(409, "Conflict", f"ConfigMap {name} came and went.")
        if not is_owned(found, known.uid):
            raise name_taken("ConfigMap", namespace, name)
        if found.get("data") != body["data"] and await self._cluster.get_pytorch_job(namespace, name) is None:
            # Left by an operator that was stopped before it made the PyTorchJob; the spec has changed since.
            await self._cluster.delete_config_map(namespace, name, uid=found["metadata"]["uid"])
            raise Conflict(409, "Conflict", f"ConfigMap {name} was out of date and is made anew.")

    async def _workers(self, known: Known, name: str, attempt: int) -> PyTorchJobView | None:
        found = await self._cluster.get_pytorch_job(known.key.namespace, name)
        if found is None or not is_owned(found, known.uid):
            return None
        return read_pytorch_job(found, attempt, edited=is_edited(found))

    async def _pods(self, known: Known, name: str, attempt: int) -> Sequence[PodView]:
        namespace = known.key.namespace
        raws: list[Raw]
        size = known.size[1] if known.size is not None and known.size[0] == attempt else None
        if size is not None and size <= FEW_PODS:
            asked = (self._cluster.get_pod(namespace, pod_name(name, index)) for index in range(size))
            raws = [found for found in await asyncio.gather(*asked) if found is not None]
        else:
            raws = [found async for found in self._cluster.list_pods(namespace, job_uid=known.uid, attempt=attempt)]
        return sorted((read_pod(raw) for raw in raws if _belongs(raw, known.uid, attempt)), key=lambda pod: pod.index)


def is_owned(raw: Mapping[str, Any], uid: str) -> bool:
    """Whether the object in `raw` is controlled by the job with that uid."""
    owners = (raw.get("metadata") or {}).get("ownerReferences") or ()
    return any(owner.get("controller") and owner.get("uid") == uid for owner in owners)


def _recorded(config_map: Mapping[str, Any] | None, key: str) -> str | None:
    data = (config_map or {}).get("data")
    return data.get(key) if isinstance(data, Mapping) else None


def _belongs(raw: Mapping[str, Any], uid: str, attempt: int) -> bool:
    labels = (raw.get("metadata") or {}).get("labels") or {}
    return labels.get(JOB_UID_LABEL) == uid and labels.get(ATTEMPT_LABEL) == str(attempt)


def name_taken(kind: str, namespace: str, name: str) -> NameTaken:
    """What somebody else's object of that name is reported by."""
    return NameTaken(
        f"The {kind} {namespace}/{name} belongs to somebody else and has the name that this job's must have: delete or "
        "rename it, and the job goes on by itself."
    )
