"""The observed state of a job: from the cache while it starts or simply runs, read from the API server for the rest.

A cached view may be a moment old, so nothing that cannot be taken back is decided by one: reconcile asks for a live one
first. A first attempt is the exception, since the name of its ConfigMap tells an operator that is late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from finetune_api.load import load_manifest
from finetune_api.problem import Problem
from finetune_api.rules import workers_of
from finetune_api.status import FineTuneJobStatus
from finetune_operator.attempts import Attempts
from finetune_operator.cache import Cache, CachedJob, ParsedSpec
from finetune_operator.children import is_calm
from finetune_operator.cluster import Cluster
from finetune_operator.desired import cluster_notices, job_problems
from finetune_operator.kept import kept_metadata, queue_labels
from finetune_operator.names import KUEUE_QUEUE_LABEL
from finetune_operator.policy.conditions import is_finished
from finetune_operator.policy.decide import attempt_is_open, holds_back, next_attempt
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.phase import reports_count_since
from finetune_operator.policy.plan import DesiredState, ObservedState
from finetune_operator.policy.verification import awaits_verdict, is_asked_for
from finetune_operator.progress.figures import progress_of
from finetune_operator.progress.inbox import Inbox
from finetune_operator.queue import Key
from finetune_operator.settings import OperatorSettings
from finetune_operator.verifications import Verifications
from finetune_operator.view import View
from finetune_operator.wire import Raw

TRAINING_CHANGED = Problem(
    "spec",
    "what is trained was changed after the first attempt had begun: put it back as it was, or create a new "
    "FineTuneJob.",
)
PLACEMENT_CHANGED = Problem(
    "spec.workers",
    "workers or secrets were changed while an attempt runs, which counts from the next attempt on: suspend the job and "
    "resume it to have it now, from the last checkpoint.",
)


class Observer:
    """Sees jobs.

    Args:
        cluster: the API server.
        settings: the operator's.
        cache: what the watches have told.
        attempts: the objects of attempts.
        verifications: the Jobs of verifications.
        inbox: the newest progress reports.
        now: wall clock, UTC.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: OperatorSettings,
        cache: Cache,
        attempts: Attempts,
        verifications: Verifications,
        inbox: Inbox,
        now: Callable[[], datetime],
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._cache = cache
        self._attempts = attempts
        self._verifications = verifications
        self._inbox = inbox
        self._now = now

    async def cached(self, key: Key) -> View | None:
        """The job as the watches have told of it; None where it has to be read.

        Raises:
            ApiError: the API server refused or did not answer.
        """
        cached = self._cache.find(key)
        if cached is None or cached.raw is None or "deletionTimestamp" in cached.raw["metadata"]:
            return None
        raw, status = cached.raw, _status(cached.raw)
        pytorch_job: PyTorchJobView | None = None
        pods: Sequence[PodView] = ()
        if is_finished(status):
            return None
        if status.attempt is not None:
            children = self._cache.children(key, cached.uid)
            pytorch_job, pods = children.of_attempt(status.attempt)
            if (
                not self._cache.synced
                or not attempt_is_open(status)
                or children.must_be_read
                or not is_calm(pytorch_job, pods)
            ):
                return None
        spec = await self._spec(raw, cached, status)
        if spec is None or (spec.job is None and not spec.desired.problems and not attempt_is_open(status)):
            return None  # an attempt may have to be made of what is not kept
        return await self._view(raw, cached, status, spec, pytorch_job, pods, live=False)

    async def live(self, key: Key) -> View | None:
        """The job as it is now; None when it is gone.

        Raises:
            ApiError: the API server refused or did not answer.
        """
        raw = await self._cluster.get_job(key.namespace, key.name)
        if raw is None:
            return None
        cached = self._cache.job_read(raw)
        status = _status(raw)
        # Not as it was read: many are read at the same time, and held while the API server is asked for more.
        raw = {**raw, "metadata": kept_metadata(raw)}
        if cached.spec is not None and cached.spec.job is None and not attempt_is_open(status):
            cached.spec = None  # an attempt, or a verification, is to be made of it
        spec = await self._spec(raw, cached, status)
        assert spec is not None  # noqa: S101  what was read has a spec
        del raw["spec"]
        pytorch_job: PyTorchJobView | None = None
        pods: Sequence[PodView] = ()
        if status.attempt is not None:
            finished = is_finished(status)
            pytorch_job, pods = await self._attempts.read(cached, status.attempt, pods_of_finished=not finished)
        return await self._view(raw, cached, status, spec, pytorch_job, pods, live=True)

    async def _view(
        self,
        raw: Raw,
        cached: CachedJob,
        status: FineTuneJobStatus,
        spec: ParsedSpec,
        pytorch_job: PyTorchJobView | None,
        pods: Sequence[PodView],
        *,
        live: bool,
    ) -> View:
        finished, desired = is_finished(status), spec.desired
        unrecorded = None
        goes = "deletionTimestamp" in raw["metadata"]
        if not finished and not attempt_is_open(status) and (goes or holds_back(desired, status, self._now())):
            # No attempt is to be made, so nobody would notice that one was, just before the operator was stopped.
            unrecorded = await self._attempts.find(cached, next_attempt(status))
        observed = ObservedState(desired=desired, status=status, unrecorded=unrecorded)
        if status.attempt is not None:
            awaited = awaits_verdict(status, verify=desired.verify)
            since = reports_count_since(status, pytorch_job, self._now())
            report = None if finished else self._inbox.newest(cached.uid, status.attempt, since)
            progress, reported = progress_of(report) if report is not None else (None, None)
            observed = replace(
                observed,
                pytorch_job=pytorch_job,
                pods=pods,
                noticed=cached.ending_since,
                progress=progress,
                reported=reported,
                reports_expected=self._settings.progress_url is not None,
                verification=await self._verifications.read(cached, status) if awaited else None,
            )
        return View(cached, raw, spec, observed, live)

    async def _spec(self, raw: Raw, cached: CachedJob, status: FineTuneJobStatus) -> ParsedSpec | None:
        """The spec of `raw`; None where that holds none and the one known is of another generation."""
        metadata = raw["metadata"]
        generation, labels = int(metadata.get("generation") or 0), queue_labels(raw)
        known = cached.spec
        if known is None or known.generation != generation or known.labels != labels:
            known = None
            if "spec" in raw:
                known = await self._parse(raw, cached, status)
        cached.spec = known
        return known

    async def _parse(self, raw: Raw, cached: CachedJob, status: FineTuneJobStatus) -> ParsedSpec:
        metadata, spec = raw["metadata"], raw["spec"]
        generation, labels = int(metadata.get("generation") or 0), queue_labels(raw)
        result = load_manifest({key: value for key, value in raw.items() if key != "status"})
        job, problems, notices = result.job, list(result.errors), list(result.warnings)
        if job is not None:
            problems = job_problems(job, self._settings)
            notices = cluster_notices(job, self._settings)
            if generation > 1 and status.attempt is not None and not is_finished(status):
                trains_other, runs_elsewhere = await self._attempts.changes(job, cached, status.attempt)
                problems += [TRAINING_CHANGED] * trains_other
                notices = [PLACEMENT_CHANGED] * (runs_elsewhere and attempt_is_open(status)) + notices
        desired = DesiredState(
            generation=generation,
            suspend=spec.get("suspend") is True,
            backoff_limit=int(spec.get("backoffLimit", 3)),
            active_deadline_seconds=spec.get("activeDeadlineSeconds"),
            ttl_seconds_after_finished=spec.get("ttlSecondsAfterFinished"),
            queue=labels.get(KUEUE_QUEUE_LABEL) or self._settings.queue_name,
            verify=is_asked_for(spec),
            problems=problems,
            notices=notices,
        )
        gpus = workers_of(job.spec).gpus_per_node if job is not None else 0
        return ParsedSpec(generation, labels, desired, job, gpus)


def once_made(spec: ParsedSpec) -> ParsedSpec | None:
    """What is kept of `spec` once its attempt is there: all but the job, which is large.

    Nothing of one that was edited: the attempt may have been found, and made of the spec before.
    """
    return replace(spec, job=None) if spec.generation == 1 else None


def _status(raw: Raw) -> FineTuneJobStatus:
    return FineTuneJobStatus.model_validate(raw.get("status") or {})
