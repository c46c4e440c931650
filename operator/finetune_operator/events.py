"""Posts Kubernetes events about a job. They are for people: one that cannot be posted is logged, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError
from finetune_operator.names import MANAGER
from finetune_operator.policy.times import rfc3339
from finetune_operator.policy.transitions import Event

MESSAGE_LIMIT = 1024
"""Most characters that the API server takes in an event's message."""

_log = logging.getLogger(__name__)


async def post_events(cluster: Cluster, job: Mapping[str, Any], events: Sequence[Event], now: datetime) -> None:
    """Post `events` about `job`, in their order."""
    for event in events:
        try:
            await cluster.create_event(job["metadata"]["namespace"], _body(job, event, now))
        except ApiError as error:
            _log.warning(
                "Event %s of %s/%s could not be posted: %s",
                event.reason,
                job["metadata"]["namespace"],
                job["metadata"]["name"],
                error,
            )


def _body(job: Mapping[str, Any], event: Event, now: datetime) -> dict[str, Any]:
    metadata = job["metadata"]
    message = event.message if len(event.message) <= MESSAGE_LIMIT else event.message[: MESSAGE_LIMIT - 1] + "…"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
        "type": event.type,
        "reason": event.reason,
        "message": message,
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "firstTimestamp": rfc3339(now),
        "lastTimestamp": rfc3339(now),
        "count": 1,
    }
