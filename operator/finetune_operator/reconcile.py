"""One look at one job: read, decide, act, write status once, and only then tell what changed.

Everything that could be wrong with the world comes back as "look again": the next look starts from what is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.load import load_manifest
from finetune_api.problem import Problem
from finetune_api.rules import workers_of
from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.attempts import Attempts
from finetune_operator.cluster import Cluster
from finetune_operator.creation import create_attempt
from finetune_operator.desired import cluster_notices, job_problems
from finetune_operator.errors import ApiError, Conflict, Unavailable
from finetune_operator.memory import Known, Memory, Reading
from finetune_operator.names import KUEUE_QUEUE_LABEL
from finetune_operator.policy.conditions import is_finished
from finetune_operator.policy.deadline import exceeded
from finetune_operator.policy.decide import attempt_is_open, decide, next_attempt, note_created
from finetune_operator.policy.observed import PyTorchJobView
from finetune_operator.policy.plan import DesiredState, ObservedState, Plan, Timeouts
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.times import moment, seconds_between
from finetune_operator.policy.transitions import events_between
from finetune_operator.policy.verification import awaits_verdict, is_asked_for
from finetune_operator.policy.waiting import waits_for
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.figures import progress_of
from finetune_operator.progress.inbox import Inbox
from finetune_operator.queue import Key, NotBefore
from finetune_operator.recorder import post_events
from finetune_operator.serving.metrics import Metrics
from finetune_operator.settings import OperatorSettings
from finetune_operator.verifications import Verifications

CONFLICT_SECONDS = 0.05
"""Wait before reading again what somebody else has changed meanwhile (seconds)."""
FIRST_REPORT_SECONDS = 300.0
"""How long an attempt that has not reported anything yet counts as preparing (seconds)."""
REPORTED_PHASES = (Phase.PREPARING, Phase.RUNNING, Phase.PUBLISHING)

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

Raw = dict[str, Any]

_log = logging.getLogger(__name__)


class Reconciler:
    """Looks at jobs.

    Args:
        cluster: the API server.
        settings: the operator's.
        memory: what is known of the jobs.
        inbox: the newest progress reports.
        authority: sees to it that trainers can trust the progress endpoint; None when there is none.
        metrics: what is counted.
        newcomers: number of jobs that wait for their very first look. As long as there are any, status waits: a
            thousand jobs applied at once all start before the first of them is described.
        now: wall clock, UTC.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: OperatorSettings,
        *,
        memory: Memory,
        inbox: Inbox,
        authority: CertificateAuthority | None,
        metrics: Metrics,
        newcomers: Callable[[], int] = lambda: 0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._memory = memory
        self._inbox = inbox
        self._authority = authority
        self._metrics = metrics
        self._newcomers = newcomers
        self._now = now
        self._attempts = Attempts(cluster, settings)
        self._verifications = Verifications(cluster, settings, self._attempts)
        self._failures: dict[Key, int] = {}
        self._patience = Timeouts(
            retry_base_seconds=settings.retry_base_seconds,
            retry_limit_seconds=settings.retry_limit_seconds,
            group_end_seconds=settings.group_end_seconds,
            pods_expected_seconds=settings.pods_expected_seconds,
            verification_seconds=settings.verification_seconds,
        )

    async def look(self, key: Key) -> float | None:
        """Look at a job once; after how many seconds to look again, or None.

        Raises:
            NotBefore: the API server asked to be left alone.
        """
        started = time.monotonic()
        result, told_seconds = "error", None
        try:
            again = await self._reconcile(key)
            result = "success" if again is None else "requeue_after"
            self._failures.pop(key, None)
        except Conflict:
            result, again = "conflict", CONFLICT_SECONDS
        except ApiError as error:
            told_seconds = error.retry_after_seconds
            again = self._wait_after_failure(key, told_seconds)
            level = logging.WARNING if isinstance(error, Unavailable) else logging.ERROR
            _log.log(level, "%s/%s: %s (again in %.1f s)", *key, error, again)
        except Exception:
            again = self._wait_after_failure(key, None)
            _log.exception("Looking at %s/%s failed in an unforeseen way; again in %.1f s.", *key, again)
        self._metrics.observe_reconcile(result, time.monotonic() - started)
        if told_seconds is not None:
            raise NotBefore(told_seconds)
        return again

    def _wait_after_failure(self, key: Key, wish: float | None) -> float:
        count = self._failures[key] = self._failures.get(key, 0) + 1
        return wish if wish is not None else min(60.0, 0.25 * 2.0 ** min(count, 10))

    async def _reconcile(self, key: Key) -> float | None:
        raw = await self._cluster.get_job(key.namespace, key.name)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            self.forget(key)
            return None
        known = self._memory.job(raw)
        observed = await self._observe(raw, known)
        now = self._now()
        plan = decide(observed, now, self._patience)
        if plan.delete_job:
            await self._cluster.delete_job(raw)
            _log.info("%s/%s: deleted, ttlSecondsAfterFinished is over.", *key)
            return None
        if plan.release and observed.pytorch_job is not None and plan.status.attempt is not None:
            await self._attempts.release(
                known, plan.status.attempt, observed.pytorch_job, keep_config_map=plan.keep_config_map
            )
        if plan.verify:
            await self._verifications.begin(plan, known, observed, now, self._patience)
        pytorch_job = observed.pytorch_job
        if plan.create is not None and known.made is not None and known.made.attempt == plan.create:
            pytorch_job, known.made = known.made, None
            note_created(plan, pytorch_job, observed, now, self._patience)
        elif plan.create is not None and known.reading is not None and known.reading.job is not None:
            job = known.reading.job
            pytorch_job = await create_attempt(
                plan,
                plan.create,
                job,
                known,
                observed,
                now,
                self._patience,
                attempts=self._attempts,
                authority=self._authority,
            )
            if pytorch_job is not None and self._newcomers():
                known.made = pytorch_job
                return 0.0
        self._remember(known, observed, plan, pytorch_job, now)
        await self._write(raw, known, observed, plan, now)
        self._count(raw, observed, plan, now)
        return seconds_between(now, plan.again_at) if plan.again_at is not None else None

    def forget(self, key: Key) -> None:
        """The job is gone."""
        known = self._memory.forget(key)
        if known is not None:
            self._inbox.forget(known.uid)
        self._failures.pop(key, None)

    async def _observe(self, raw: Raw, known: Known) -> ObservedState:
        status = FineTuneJobStatus.model_validate(raw.get("status") or {})
        desired = await self._wishes(raw, known, status)
        finished = is_finished(status)
        unrecorded = None
        if not finished and not attempt_is_open(status) and _holds_back(desired, status, self._now()):
            # No attempt is to be made, so nobody would notice that one was, just before the operator was stopped.
            unrecorded = await self._attempts.find(known, next_attempt(status))
        if status.attempt is None:
            return ObservedState(desired=desired, status=status, unrecorded=unrecorded)
        pytorch_job, pods = await self._attempts.read(known, status.attempt, pods_of_finished=not finished)
        awaited = awaits_verdict(status, verify=desired.verify)
        report = None if finished else self._inbox.newest(known.uid, status.attempt)
        progress, reported = progress_of(report) if report is not None else (None, None)
        if reported is None and status.phase in REPORTED_PHASES:
            reported = status.phase  # an operator that has just started has no report yet
        begun = moment(status.attempt_start_time)
        if reported is None and self._settings.progress_url is not None and begun is not None:
            # A trainer reports as soon as it lives. One that never does is another's, and simply runs.
            quiet = seconds_between(begun, self._now())
            reported = Phase.PREPARING if quiet < FIRST_REPORT_SECONDS else None
        return ObservedState(
            desired=desired,
            status=status,
            pytorch_job=pytorch_job,
            pods=pods,
            unrecorded=unrecorded,
            noticed=known.ending_since,
            progress=progress,
            reported=reported,
            verification=await self._verifications.read(known, status) if awaited else None,
        )

    async def _wishes(self, raw: Raw, known: Known, status: FineTuneJobStatus) -> DesiredState:
        generation = int(raw["metadata"].get("generation") or 0)
        labels = raw["metadata"].get("labels") or {}
        reading = known.reading
        if (
            reading is None
            or reading.generation != generation
            or reading.labels != labels
            or (
                # What had to wait for the next attempt is done by it.
                PLACEMENT_CHANGED in reading.notices and reading.attempt != status.attempt
            )
        ):
            reading = known.reading = await self._read(raw, known, status)
        spec = raw.get("spec") or {}
        return DesiredState(
            generation=generation,
            suspend=spec.get("suspend") is True,
            backoff_limit=int(spec.get("backoffLimit", 3)),
            active_deadline_seconds=spec.get("activeDeadlineSeconds"),
            ttl_seconds_after_finished=spec.get("ttlSecondsAfterFinished"),
            queue=labels.get(KUEUE_QUEUE_LABEL) or self._settings.queue_name,
            verify=is_asked_for(spec),
            problems=reading.problems,
            notices=reading.notices,
        )

    async def _read(self, raw: Raw, known: Known, status: FineTuneJobStatus) -> Reading:
        generation, labels = int(raw["metadata"].get("generation") or 0), raw["metadata"].get("labels") or {}
        result = load_manifest({key: value for key, value in raw.items() if key != "status"})
        job = result.job
        if job is None:
            return Reading(generation, labels, status.attempt, None, result.errors, result.warnings)
        problems = job_problems(job, self._settings)
        notices = cluster_notices(job, self._settings)
        if status.attempt is not None and not is_finished(status):
            trains_other, runs_elsewhere = await self._attempts.changes(job, known, status.attempt)
            if trains_other:
                problems = [*problems, TRAINING_CHANGED]
            if runs_elsewhere and attempt_is_open(status):
                notices = [PLACEMENT_CHANGED, *notices]
        return Reading(generation, labels, status.attempt, job, problems, notices)

    def _remember(
        self, known: Known, observed: ObservedState, plan: Plan, pytorch_job: PyTorchJobView | None, now: datetime
    ) -> None:
        status = plan.status
        known.ending_since = (known.ending_since or now) if plan.ending else None
        known.phase = status.phase
        known.note_wait(waits_for(status), now)
        known.verifying = awaits_verdict(status, verify=observed.desired.verify)
        known.settled = is_finished(status) and plan.again_at is None and not plan.release and not known.verifying
        is_open = not is_finished(status) and attempt_is_open(status)
        known.attempt = status.attempt if is_open else None
        known.workers_uid = pytorch_job.uid if is_open and pytorch_job is not None else ""
        if pytorch_job is not None:
            known.size = (pytorch_job.attempt, pytorch_job.nodes)
        job = known.reading.job if known.reading else None
        running = is_open and pytorch_job is not None and not pytorch_job.suspended and pytorch_job.nodes
        known.gpus = (
            pytorch_job.nodes * _gpus_per_node(job) if running and pytorch_job is not None and job is not None else 0
        )
        if not is_open:
            self._inbox.forget(known.uid)

    async def _write(self, raw: Raw, known: Known, observed: ObservedState, plan: Plan, now: datetime) -> None:
        status = plan.status
        if status == observed.status:
            return
        body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        if not status.attempts:
            del body["attempts"]
        written = await self._cluster.update_job_status({**raw, "status": body})
        known.written_version = written["metadata"]["resourceVersion"]
        desired = observed.desired
        events = events_between(observed.status, status, problems=desired.problems, notices=desired.notices)
        await post_events(self._cluster, written, events, now)

    def _count(self, raw: Raw, observed: ObservedState, plan: Plan, now: datetime) -> None:
        numbers = {attempt.number for attempt in observed.status.attempts}
        for attempt in plan.status.attempts:
            if attempt.number not in numbers:
                self._metrics.attempt_ended(attempt.reason or OperatorReason.WORKERS_FAILED)
        created = moment(raw["metadata"].get("creationTimestamp"))
        if observed.status.start_time is None and plan.status.start_time is not None and created is not None:
            self._metrics.started(seconds_between(created, now))


def _holds_back(desired: DesiredState, status: FineTuneJobStatus, now: datetime) -> bool:
    """Whether the spec allows no further attempt just now."""
    return desired.suspend or bool(desired.problems) or exceeded(status, desired.active_deadline_seconds, now)


def _gpus_per_node(job: FineTuneJob) -> int:
    return workers_of(job.spec).gpus_per_node
