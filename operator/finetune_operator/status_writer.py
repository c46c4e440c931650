"""The one write of a reconcile: status, then the events of what has changed. The next one needs not read it again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune_api.status import FineTuneJobStatus
from finetune_operator.cache import CachedJob
from finetune_operator.children import is_newer
from finetune_operator.cluster import Cluster
from finetune_operator.errors import Conflict, NotFound
from finetune_operator.events import EventBroadcaster
from finetune_operator.kept import kept, kept_metadata, queue_labels
from finetune_operator.policy.transitions import events_between
from finetune_operator.view import View
from finetune_operator.wire import Raw

TRIES = 5
"""Times that a status is written while others write the same object."""


class StatusWriter:
    """Writes the status of jobs.

    Args:
        cluster: the API server.
        events: tells people what has changed.
    """

    def __init__(self, cluster: Cluster, events: EventBroadcaster) -> None:
        self._cluster = cluster
        self._events = events

    async def write(self, view: View, status: FineTuneJobStatus, now: datetime) -> bool:
        """Write a status where it has changed, and tell what did; False where the job is gone.

        Raises:
            ApiError: Conflict, where what was decided by has changed; or any other.
        """
        cached, before = view.cached, view.observed.status
        if status == before:
            _keep(cached, view.raw, view.raw.get("status") or {}, view.raw["metadata"]["resourceVersion"])
            return True
        body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        if not status.attempts:
            del body["attempts"]
        try:
            written = await self._update(view, body)
        except NotFound:
            return False
        _keep(cached, view.raw, body, written["metadata"]["resourceVersion"])
        desired = view.observed.desired
        events = events_between(before, status, problems=desired.problems, notices=desired.notices)
        await self._events.record(view.raw, events, now)
        return True

    async def _update(self, view: View, body: Mapping[str, Any]) -> Raw:
        """Write it also past somebody who writes what it does not depend on, such as labels; the new metadata."""
        raw = view.raw
        for _ in range(TRIES - 1):
            try:
                return await self._cluster.update_job_status(raw, body)
            except Conflict:
                newest = await self._cluster.get_job(*view.cached.key)
                if newest is None or _decided_by(newest) != _decided_by(view.raw):
                    raise
                raw = kept(newest)
                del newest
        return await self._cluster.update_job_status(raw, body)


def _decided_by(raw: Raw) -> tuple[Any, ...]:
    """What of a FineTuneJob decisions depend on."""
    metadata = raw["metadata"]
    gone = "deletionTimestamp" in metadata
    return metadata["uid"], metadata.get("generation"), queue_labels(raw), raw.get("status") or {}, gone


def _keep(cached: CachedJob, raw: Raw, status: Mapping[str, Any], version: str) -> None:
    """Keep what the next reconcile needs: the newest status, without the spec, which is parsed."""
    if is_newer(cached.version, version):
        return  # a watch has told of something newer meanwhile
    cached.version = version
    metadata = {**kept_metadata(raw), "resourceVersion": version}
    kept = {"apiVersion": raw["apiVersion"], "kind": raw["kind"], "metadata": metadata, "status": status}
    cached.raw = None if cached.ended and cached.done else kept
