"""A look at everything, at start and every few minutes: finds what no event told, and proves that events still come.

Also says what is to be done about a job as it is in an event or a list, so that a thousand finished jobs cost nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.attempts import is_owned
from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError, NotFound
from finetune_operator.memory import Memory
from finetune_operator.names import ATTEMPT_LABEL, JOB_NAME_LABEL
from finetune_operator.policy.times import moment, seconds_between
from finetune_operator.policy.verification import awaits_verdict, is_asked_for
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.serving.health import Heartbeat

RETRY_SECONDS = 5.0
"""Wait after a resync that failed (seconds)."""
ON_ITS_WAY_SECONDS = 5.0
"""Time that an event may take (seconds): what is only missing for that long was not missed."""
LOOK_SECONDS = 0.1
JITTER = 0.1
JOBS, PYTORCH_JOBS = "finetunejobs", "pytorchjobs"
ENDED_PHASES = ("Succeeded", "Failed")
"""Of jobs and pods; a PyTorchJob has conditions of these names."""

_log = logging.getLogger(__name__)


class Dispatcher:
    """From a job that was seen to the time at which to look at it."""

    def __init__(
        self, queue: WorkQueue, memory: Memory, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._queue = queue
        self._memory = memory
        self._now = now

    def job_seen(self, raw: Mapping[str, Any]) -> None:
        """A FineTuneJob changed."""
        if raw["metadata"]["resourceVersion"] != self._memory.job(raw).written_version:
            self.job_listed(raw)
        # else it is the echo of our own write, which said when to look again

    def job_listed(self, raw: Mapping[str, Any]) -> None:
        """A FineTuneJob is as it is; what has become of its children is not known."""
        known = self._memory.job(raw)
        metadata, status = raw["metadata"], raw.get("status") or {}
        if not _is_finished(status) or status.get("observedGeneration") != metadata.get("generation"):
            self._queue.add(known.key, first="phase" not in status)
            return
        known.phase = Phase(status["phase"]) if status.get("phase") in list(Phase) else None
        spec = raw.get("spec") or {}
        known.verifying = is_asked_for(spec) and awaits_verdict(FineTuneJobStatus.model_validate(status), verify=True)
        if known.verifying:
            self._queue.add(known.key)
            return
        ttl, completed = spec.get("ttlSecondsAfterFinished"), moment(status.get("completionTime"))
        if ttl is not None and completed is not None:
            self._queue.add(known.key, after_seconds=max(0.0, ttl - seconds_between(completed, self._now())))

    def child_seen(self, namespace: str, job_name: str, *, ended: bool = False) -> None:
        """A PyTorchJob or pod of the job changed; whether it has ended and holds nothing any more.

        The Job of a verification is not watched: its pod tells of everything that a verdict is made of.
        """
        key = Key(namespace, job_name)
        known = self._memory.find(key)
        # A job that is not known yet is looked at once it is seen itself, unless it has ended as well.
        over = known is None or (known.phase in ENDED_PHASES and not known.verifying)
        if not (ended and over) and not (known is not None and known.settled):
            self._queue.add(key)


def child_ended(raw: Mapping[str, Any]) -> bool:
    """Whether a PyTorchJob or pod has ended."""
    status = raw.get("status") or {}
    conditions = status.get("conditions") or ()
    return status.get("phase") in ENDED_PHASES or any(item.get("type") in ENDED_PHASES for item in conditions)


def _is_finished(status: Mapping[str, Any]) -> bool:
    return any(
        condition.get("type") == "Succeeded" and condition.get("status") in ("True", "False")
        for condition in status.get("conditions") or ()
    )


class Resync:
    """Looks at everything.

    Args:
        cluster: the API server.
        namespaces: where the jobs are; None stands for all.
        period_seconds: time between two looks (seconds).
        dispatcher: what is to be done about each job.
        queue: where unreleased attempts are put.
        memory: what is known of the jobs.
        heartbeat: told of what no event had told.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespaces: tuple[str | None, ...],
        *,
        period_seconds: float,
        dispatcher: Dispatcher,
        queue: WorkQueue,
        memory: Memory,
        heartbeat: Heartbeat,
    ) -> None:
        self._cluster = cluster
        self._namespaces = namespaces
        self._period_seconds = period_seconds
        self._dispatcher = dispatcher
        self._queue = queue
        self._memory = memory
        self._heartbeat = heartbeat

    async def run(self) -> None:
        """Resync until cancelled."""
        while True:
            wait = self._period_seconds * (1 + random.uniform(-JITTER, JITTER))
            try:
                await self.once()
            except ApiError as error:
                _log.warning("The cluster could not be looked over: %s", error)
                wait = min(RETRY_SECONDS, self._period_seconds)
            await asyncio.sleep(wait)

    async def once(self) -> None:
        """Look at everything once.

        Raises:
            ApiError: the API server refused or did not answer.
        """
        listed: dict[Key, str] = {}
        for namespace in self._namespaces:
            async for raw in self._cluster.list_jobs(namespace):
                known = self._memory.job(raw)
                listed[known.key] = raw["metadata"]["resourceVersion"]
                self._dispatcher.job_listed(raw)
            await self._look_for_unreleased(namespace)
        gone = [key for key in self._memory.known_keys() if key not in listed]
        for key in gone:
            # It may be younger than the list, or gone without an event; a look tells.
            self._queue.add(key)
        self._heartbeat.resynced({JOBS: await self._missed(listed)})

    async def _look_for_unreleased(self, namespace: str | None) -> None:
        """Finished jobs whose attempt still holds machines, because the operator was stopped before it let go."""
        try:
            async for raw in self._cluster.list_pytorch_jobs(namespace):
                metadata = raw["metadata"]
                if self._is_stray(raw):
                    await self._cluster.delete_pytorch_job(metadata["namespace"], metadata["name"], uid=metadata["uid"])
                    continue
                name = metadata["labels"].get(JOB_NAME_LABEL)
                if name and not child_ended(raw):
                    self._queue.add(Key(metadata["namespace"], name))
        except NotFound:
            return  # without the training operator there is nothing to let go

    def _is_stray(self, raw: Mapping[str, Any]) -> bool:
        """Whether an operator that stood still made this long after its attempt had ended: a later one is running."""
        metadata = raw["metadata"]
        labels = metadata["labels"]
        known = self._memory.find(Key(metadata["namespace"], labels.get(JOB_NAME_LABEL, "")))
        attempt = labels.get(ATTEMPT_LABEL, "")
        return (
            known is not None
            and known.attempt is not None
            and is_owned(raw, known.uid)
            and attempt.isdecimal()
            and int(attempt) < known.attempt
        )

    async def _missed(self, listed: Mapping[Key, str]) -> int:
        """How many jobs of the list no event has told of, although one had time to come."""

        def unannounced() -> list[Key]:
            known = ((key, self._memory.find(key)) for key in listed)
            return [
                key
                for key, job in known
                if job is not None
                and listed[key] not in (job.announced_version, job.written_version)
                and not _newer(job.announced_version, listed[key])
            ]

        for _ in range(round(ON_ITS_WAY_SECONDS / LOOK_SECONDS)):
            if not unannounced():
                return 0
            await asyncio.sleep(LOOK_SECONDS)
        return len(unannounced())


def _newer(version: str, other: str) -> bool:
    """Whether resourceVersion `version` is a later one; Kubernetes compares them as numbers since 1.35."""
    return version.isdecimal() and other.isdecimal() and int(version) > int(other)
