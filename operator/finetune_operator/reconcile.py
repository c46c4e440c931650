"""One reconcile of one job: observe, decide, act, write status once, and only then tell what changed.

Everything that could be wrong with the world comes back as "again later": the next one starts from what is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from finetune_api.status import FineTuneJobStatus
from finetune_operator.attempts import Attempts
from finetune_operator.cache import Cache, CachedJob
from finetune_operator.children import is_over
from finetune_operator.cluster import Cluster
from finetune_operator.creation import Creation
from finetune_operator.errors import ApiError, Conflict, Unavailable
from finetune_operator.events import EventBroadcaster
from finetune_operator.observe import Observer, once_made
from finetune_operator.policy.conditions import is_finished
from finetune_operator.policy.decide import attempt_is_open, decide
from finetune_operator.policy.observed import PyTorchJobView
from finetune_operator.policy.plan import Plan, Timeouts
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.times import moment, seconds_between
from finetune_operator.policy.verification import awaits_verdict
from finetune_operator.policy.waiting import waits_for
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.inbox import Inbox
from finetune_operator.queue import Key, NotBefore
from finetune_operator.serving.metrics import Metrics
from finetune_operator.settings import OperatorSettings
from finetune_operator.status_writer import StatusWriter
from finetune_operator.verifications import Verifications
from finetune_operator.view import View

FIRST_BACKOFF_SECONDS, FIRST_CONFLICT_SECONDS, BACKOFF_LIMIT_SECONDS = 0.5, 0.05, 60.0
"""Wait after the first failure in a row, after the first conflict, and the longest one (seconds)."""

_log = logging.getLogger(__name__)


class Reconciler:
    """Reconciles jobs.

    Args:
        cluster: the API server.
        settings: the operator's.
        cache: what the watches have told.
        inbox: the newest progress reports.
        authority: sees to it that trainers can trust the progress endpoint; None when there is none.
        metrics: what is counted.
        events: tells people what has changed.
        now: wall clock, UTC.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: OperatorSettings,
        *,
        cache: Cache,
        inbox: Inbox,
        authority: CertificateAuthority | None,
        metrics: Metrics,
        events: EventBroadcaster,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._inbox = inbox
        self._metrics = metrics
        self._now = now
        self._failures: dict[Key, int] = {}
        self._under_way: dict[Key, CachedJob | None] = {}
        """Key that is being reconciled -> the job of that name that has gone since the begin, if one has."""
        self._timeouts = Timeouts(
            retry_base_seconds=settings.retry_base_seconds,
            retry_limit_seconds=settings.retry_limit_seconds,
            group_end_seconds=settings.group_end_seconds,
            pods_expected_seconds=settings.pods_expected_seconds,
            verification_seconds=settings.verification_seconds,
        )
        self._attempts = Attempts(cluster, settings, cache)
        self._verifications = Verifications(cluster, settings, self._attempts, self._timeouts)
        self._writer = StatusWriter(cluster, events)
        self._creation = Creation(self._attempts, authority, self._timeouts)
        self._observer = Observer(cluster, settings, cache, self._attempts, self._verifications, inbox, now)

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile a job once; after how many seconds to do so again, or None.

        Raises:
            NotBefore: the API server asked to be left alone.
        """
        started = time.monotonic()
        result, told_seconds = "error", None
        self._under_way[key] = None
        try:
            again = await self._reconcile(key)
            result = "success" if again is None else "requeue_after"
            self._failures.pop(key, None)
        except Conflict:
            result, again = "conflict", self._backoff_seconds(key, FIRST_CONFLICT_SECONDS)
        except ApiError as error:
            told_seconds = error.retry_after_seconds
            again = told_seconds if told_seconds is not None else self._backoff_seconds(key, FIRST_BACKOFF_SECONDS)
            level = logging.WARNING if isinstance(error, Unavailable) else logging.ERROR
            _log.log(level, "%s/%s: %s (again in %.1f s)", *key, error, again)
        except Exception:
            again = self._backoff_seconds(key, FIRST_BACKOFF_SECONDS)
            _log.exception("Reconciling %s/%s failed in an unforeseen way; again in %.1f s.", *key, again)
        self._metrics.observe_reconcile(result, time.monotonic() - started)
        cached = self._cache.find(key)
        if result in ("conflict", "error") and cached is not None:
            # A write may have been carried out all the same: what is known is older than it.
            cached.raw = None
        self._drop_leftovers(key)
        if told_seconds is not None:
            raise NotBefore(told_seconds)
        return again

    async def _reconcile(self, key: Key) -> float | None:
        now = self._now()
        view = await self._observer.cached(key)
        plan = decide(view.observed, now, self._timeouts) if view is not None else None
        if view is None or plan is None or _is_irrevocable(plan, view.observed.status):
            known = self._cache.find(key)
            view = await self._observer.live(key)
            if view is None:
                self._gone(key, known)
                return None
            if "deletionTimestamp" in view.raw["metadata"]:
                await self._stop(view)
                return None
            now = self._now()
            plan = decide(view.observed, now, self._timeouts)
        cached, observed = view.cached, view.observed
        if plan.delete_job:
            await self._cluster.delete_job(view.raw)
            _log.info("%s/%s: deleted, ttlSecondsAfterFinished is over.", *key)
            return None
        if plan.release and observed.pytorch_job is not None and plan.status.attempt is not None:
            await self._attempts.release(
                cached, plan.status.attempt, observed.pytorch_job, keep_config_map=plan.keep_config_map
            )
        if plan.leftover_config_map is not None:
            await self._attempts.release(cached, plan.leftover_config_map, None)
        if plan.verify:
            await self._verifications.begin(plan, view, now)
        pytorch_job = observed.pytorch_job
        if plan.create is not None:
            pytorch_job = await self._creation.create(plan, plan.create, view, now)
            if pytorch_job is not None:
                plan.again_at = now  # what has become of it was told before status knew of it
        if plan.status.attempt != observed.status.attempt:
            cached.spec = once_made(view.spec)
        self._remember(view, plan, pytorch_job, now)
        if not await self._writer.write(view, plan.status, now):
            self._gone(key, cached)  # deleted in the meantime; what was made for it goes after it
            return None
        self._count(view, plan, now)
        return seconds_between(now, plan.again_at) if plan.again_at is not None else None

    def forget(self, key: Key) -> None:
        """The job is gone."""
        if key in self._under_way:
            self._under_way[key] = self._cache.find(key) or self._under_way[key]
        self._cache.forget(key)
        self._failures.pop(key, None)

    def _gone(self, key: Key, known: CachedJob | None) -> None:
        """The job was not there, or not any more, when it was asked for."""
        if self._cache.find(key) is known:  # a watch may have told of another one of that name meanwhile
            self.forget(key)

    def _drop_leftovers(self, key: Key) -> None:
        """Of a job that went while it was reconciled nothing is kept, also of what was read of it before and came late.

        Nobody would look at it once more: what is forgotten is not due any more, however a reconcile of it ends.
        """
        gone = self._under_way.pop(key)
        if gone is None:
            return
        self._failures.pop(key, None)
        self._cache.release_children(gone)
        found = self._cache.find(key)
        if found is not None and found.uid == gone.uid:
            self._cache.forget(key)

    def _backoff_seconds(self, key: Key, first: float) -> float:
        count = self._failures[key] = self._failures.get(key, 0) + 1
        return min(BACKOFF_LIMIT_SECONDS, first * 2.0 ** min(count - 1, 20))

    async def _stop(self, view: View) -> None:
        """The job is on its way out: it may be held up by somebody's finalizer, its machines are not."""
        for pytorch_job in (view.observed.pytorch_job, view.observed.unrecorded):
            if pytorch_job is not None and not pytorch_job.deleting:
                await self._attempts.release(view.cached, pytorch_job.attempt, pytorch_job, keep_config_map=True)
        view.cached.attempt = None
        view.cached.raw = view.cached.spec = None  # somebody's finalizer may hold it for ever, and it has to be read

    def _remember(self, view: View, plan: Plan, pytorch_job: PyTorchJobView | None, now: datetime) -> None:
        cached, status = view.cached, plan.status
        cached.ending_since = (cached.ending_since or now) if plan.ending else None
        cached.phase = status.phase
        cached.note_wait(waits_for(status), now)
        cached.verifying = awaits_verdict(status, verify=view.spec.desired.verify)
        at_rest = plan.again_at is None and not plan.release and not cached.verifying
        # Until it is over a PyTorchJob may be stopped by its queue and let go on, with new pods.
        cached.done = is_finished(status) and at_rest and (pytorch_job is None or is_over(pytorch_job))
        if cached.done:
            self._cache.release_children(cached)
        cached.newest_attempt = status.attempt
        is_open = not is_finished(status) and attempt_is_open(status)
        cached.attempt = status.attempt if is_open else None
        if is_finished(status) and not cached.verifying:
            cached.spec = None  # there may be thousands, and none is made anything of any more
        elif is_open and cached.spec is not None:
            cached.spec = replace(cached.spec, job=None)  # an operator that found the attempt has parsed it
        cached.pytorch_job_uid = pytorch_job.uid if is_open and pytorch_job is not None else ""
        running = is_open and pytorch_job is not None and not pytorch_job.suspended
        cached.gpus = pytorch_job.nodes * view.spec.gpus_per_node if running and pytorch_job is not None else 0
        if pytorch_job is not None:
            cached.size = (pytorch_job.attempt, pytorch_job.nodes)
            cached.workers = (pytorch_job.attempt, pytorch_job.uid)
        if not is_open:
            self._inbox.forget(cached.uid)

    def _count(self, view: View, plan: Plan, now: datetime) -> None:
        before = view.observed.status
        numbers = {attempt.number for attempt in before.attempts}
        for attempt in plan.status.attempts:
            if attempt.number not in numbers:
                self._metrics.attempt_ended(attempt.reason or OperatorReason.WORKERS_FAILED)
        created = moment(view.raw["metadata"].get("creationTimestamp"))
        if before.start_time is None and plan.status.start_time is not None and created is not None:
            self._metrics.started(seconds_between(created, now))


def _is_irrevocable(plan: Plan, before: FineTuneJobStatus) -> bool:
    """Whether the plan ends, deletes or repeats something, for which what was seen has to be the newest there is."""
    ends = is_finished(plan.status) or plan.status.attempts != before.attempts
    return ends or plan.release or plan.delete_job or plan.verify or (plan.create or 1) > 1
