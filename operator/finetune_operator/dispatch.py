"""From what a watch told to the time of the next reconcile: a thousand finished jobs must cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.cache import Cache, CachedJob
from finetune_operator.names import FINETUNE_PLURAL
from finetune_operator.policy.conditions import is_finished
from finetune_operator.policy.times import moment, seconds_between
from finetune_operator.policy.verification import awaits_verdict, is_asked_for
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.serving.health import Heartbeat
from finetune_operator.wire import Raw


class Dispatcher:
    """Takes every event.

    Args:
        queue: takes the jobs to reconcile.
        cache: keeps what was seen.
        heartbeat: told that events come.
        forget: called for a job that is gone, of which the queue keeps nothing then.
        now: wall clock, UTC.
    """

    def __init__(
        self,
        queue: WorkQueue,
        cache: Cache,
        heartbeat: Heartbeat,
        *,
        forget: Callable[[Key], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._queue = queue
        self._cache = cache
        self._heartbeat = heartbeat
        self._forget = forget
        self._now = now

    def seen(self, kind: str, raw: Raw, deleted: bool) -> None:
        """A watch told of an object."""
        self._heartbeat.event(kind, raw["metadata"]["namespace"])
        if kind != FINETUNE_PLURAL:
            # The Job of a verification is not watched: its pod tells of everything that a verdict is made of.
            key = self._cache.child_seen(kind, raw, deleted=deleted)
            cached = self._cache.find(key) if key is not None else None
            if cached is not None and (self._cache.synced or cached.ended or cached.verifying):
                self._queue.add(cached.key)
        elif deleted:
            key = Key(raw["metadata"]["namespace"], raw["metadata"]["name"])
            cached = self._cache.find(key)
            if cached is not None and cached.uid == raw["metadata"]["uid"]:
                self._forget(key)
                self._queue.forget(key)
        else:
            cached = self._cache.job_seen(raw)
            # None is the echo of our own write, which said when to reconcile again.
            if cached is not None:
                self._job_changed(cached, raw)

    def _job_changed(self, cached: CachedJob, raw: Raw) -> None:
        metadata, status = raw["metadata"], raw.get("status") or {}
        goes, ended = "deletionTimestamp" in metadata, is_finished(status)
        if goes or not ended or status.get("observedGeneration") != metadata.get("generation"):
            cached.done = False
            if self._cache.synced or goes or ended or status.get("attempt") is None:
                self._queue.add(cached.key)
            # else its children may not have been listed yet; the first resync knows when they are
            return
        cached.newest_attempt = status.get("attempt")
        cached.phase = Phase(status["phase"]) if status.get("phase") in list(Phase) else None
        spec = raw.get("spec") or {}
        cached.verifying = is_asked_for(spec) and awaits_verdict(FineTuneJobStatus.model_validate(status), verify=True)
        if cached.verifying or self._cache.children(cached.key, cached.uid).living:
            self._queue.add(cached.key)
            return
        cached.raw = cached.spec = None
        self._cache.release_children(cached)
        ttl, completed = spec.get("ttlSecondsAfterFinished"), moment(status.get("completionTime"))
        if ttl is not None and completed is not None:
            self._queue.add(cached.key, after_seconds=max(0.0, ttl - seconds_between(completed, self._now())))
