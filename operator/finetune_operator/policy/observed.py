"""What was read of an attempt, or of a verification: its Job and pods, taken apart so that policies see no raw objects.

Everything here comes from others (kubelets, the training operator, whatever a tenant may write), so nothing is taken
for granted: what is missing or of another shape is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_api.outcome import TerminationMessage
from finetune_operator.names import PYTORCH_CONTAINER, REPLICA_INDEX_LABEL, VERIFICATION_CONTAINER, WORKER_REPLICA
from finetune_operator.policy.times import moment

DISRUPTION_REASONS = (
    "Evicted",
    "NodeLost",
    "NodeShutdown",
    "Shutdown",
    "Terminated",
    "Preempting",
    "NodeAffinity",
    "TopologyAffinityError",
    "UnexpectedAdmissionError",
)
"""`status.reason` of pods that the cluster ended for its own sake, or that a node refused after all, as one does whose
GPUs are not announced yet. OutOfcpu, OutOfmemory, OutOfnvidia.com/gpu … belong to them."""
NO_ROOM_PREFIX = "OutOf"


@dataclass(frozen=True, kw_only=True)
class PodView:
    """One worker's pod."""

    index: int
    """Number of the worker, from 0; worker 0 runs rank 0."""
    name: str
    uid: str
    owner_uid: str = ""
    """uid of the PyTorchJob that it belongs to."""
    phase: str
    created_at: datetime | None = None
    deleting: bool = False
    disruption: str | None = None
    """Why the cluster ended it, as the cluster says it; None when it did not."""
    unschedulable: str | None = None
    """Why no node takes it, as the scheduler says it."""
    waiting: str | None = None
    """Reason for which the container has not started, such as ImagePullBackOff."""
    waiting_message: str = ""
    running: bool = False
    ended: bool = False
    exit_code: int | None = None
    """Exit code of the trainer's container; None until it has ended or when it never ran."""
    ended_reason: str = ""
    """The kubelet's word for the end of the container: Completed, Error, OOMKilled, StartError …"""
    ended_message: str = ""
    """The kubelet's or the container's own text about its end."""
    last_words: TerminationMessage | None = None
    ended_at: datetime | None = None

    @property
    def holds_machine(self) -> bool:
        """Whether it still takes up room on a node: a container beside the trainer's may go on after that one."""
        return self.phase not in ("Succeeded", "Failed")

    @property
    def succeeded(self) -> bool:
        """Whether it ended with exit code 0."""
        return self.ended and (self.exit_code == 0 or (self.exit_code is None and self.phase == "Succeeded"))


@dataclass(frozen=True, kw_only=True)
class PyTorchJobView:
    """The PyTorchJob of one attempt."""

    name: str
    uid: str
    attempt: int
    nodes: int
    """Pods that it is to have."""
    created_at: datetime | None = None
    deleting: bool = False
    suspended: bool = False
    """By somebody else, such as Kueue; until the training operator, too, has taken note that this is over."""
    has_run: bool = False
    """Its pods ran at some time, if not now."""
    started_at: datetime | None = None
    """When the training operator began with it, after the last suspension."""
    resumed_at: datetime | None = None
    """When it was last let go by whoever had suspended it; None if nobody had."""
    end: str | None = None
    """Succeeded or Failed, once the training operator says so."""
    end_message: str = ""
    ended_at: datetime | None = None
    edited: bool = False
    """Somebody changed what we made."""

    @property
    def ended(self) -> bool:
        """Whether the training operator is done with it."""
        return self.end is not None


@dataclass(frozen=True, kw_only=True)
class VerificationView:
    """The batch Job that verifies an adapter, and its pods."""

    name: str
    uid: str
    created_at: datetime | None = None
    started_at: datetime | None = None
    """When its controller began with it, after the last suspension."""
    deleting: bool = False
    suspended: bool = False
    """By Kueue or somebody like it."""
    ended: bool = False
    end_reason: str = ""
    """The controller's word for a failure, such as DeadlineExceeded; empty after success."""
    end_message: str = ""
    pods: Sequence[PodView] = ()
    """Oldest first. One that a disruption ended is followed by another."""


def read_pod(raw: Mapping[str, Any], container_name: str = PYTORCH_CONTAINER) -> PodView:
    """What matters of a pod, and of its container of that name."""
    metadata, status = _map(raw, "metadata"), _map(raw, "status")
    phase = str(status.get("phase") or "Pending")
    conditions = {str(item.get("type")): item for item in _maps(status, "conditions")}
    container = next((item for item in _maps(status, "containerStatuses") if item.get("name") == container_name), {})
    state = _map(container, "state")
    waiting, ended = _map(state, "waiting"), _map(state, "terminated")
    exit_code = ended.get("exitCode")
    scheduled = conditions.get("PodScheduled", {})
    text = str(ended.get("message") or "")
    return PodView(
        index=_number(_map(metadata, "labels").get(REPLICA_INDEX_LABEL)),
        name=str(metadata.get("name", "")),
        uid=str(metadata.get("uid", "")),
        owner_uid=next((str(owner.get("uid")) for owner in _maps(metadata, "ownerReferences")), ""),
        phase=phase,
        created_at=moment(str(metadata.get("creationTimestamp") or "")),
        deleting="deletionTimestamp" in metadata,
        disruption=_disruption(status, conditions),
        unschedulable=str(scheduled.get("message") or "No node can take the pod.")
        if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
        else None,
        waiting=str(waiting["reason"]) if waiting.get("reason") else None,
        waiting_message=str(waiting.get("message") or ""),
        running="running" in state,
        ended=bool(ended) or phase in ("Succeeded", "Failed"),
        exit_code=exit_code if isinstance(exit_code, int) else None,
        ended_reason=str(ended.get("reason") or status.get("reason") or ""),
        ended_message=text or str(status.get("message") or ""),
        last_words=TerminationMessage.parse(text) if text else None,
        ended_at=moment(str(ended.get("finishedAt") or "")) or _condition_time(conditions.get("Ready")),
    )


def _disruption(status: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]) -> str | None:
    target = conditions.get("DisruptionTarget", {})
    if target.get("status") == "True":
        return str(target.get("message") or target.get("reason") or "DisruptionTarget")
    reason = str(status.get("reason") or "")
    if status.get("phase") == "Failed" and (reason in DISRUPTION_REASONS or reason.startswith(NO_ROOM_PREFIX)):
        return f"{reason}: {status['message']}" if status.get("message") else reason
    return None


def _condition_time(condition: Mapping[str, Any] | None) -> datetime | None:
    return moment(str(condition.get("lastTransitionTime") or "")) if condition else None


def read_pytorch_job(raw: Mapping[str, Any], attempt: int, *, edited: bool = False) -> PyTorchJobView:
    """What matters of a PyTorchJob."""
    metadata, spec, status = _map(raw, "metadata"), _map(raw, "spec"), _map(raw, "status")
    conditions = {str(item.get("type")): item for item in _maps(status, "conditions")}
    true = {name: item for name, item in conditions.items() if item.get("status") == "True"}
    suspension = conditions.get("Suspended", {})
    end = next((kind for kind in ("Failed", "Succeeded") if kind in true), None)
    return PyTorchJobView(
        name=str(metadata.get("name", "")),
        uid=str(metadata.get("uid", "")),
        attempt=attempt,
        nodes=_number(_map(_map(spec, "pytorchReplicaSpecs"), WORKER_REPLICA).get("replicas")),
        created_at=moment(str(metadata.get("creationTimestamp") or "")),
        deleting="deletionTimestamp" in metadata,
        suspended=_map(spec, "runPolicy").get("suspend") is True or "Suspended" in true,
        has_run="Running" in conditions,
        started_at=moment(str(status.get("startTime") or "")),
        resumed_at=_condition_time(suspension) if suspension.get("status") == "False" else None,
        end=end,
        end_message=str(true[end].get("message") or "") if end else "",
        ended_at=moment(str(status.get("completionTime") or "")) or _condition_time(true.get(end) if end else None),
        edited=edited,
    )


def read_verification(raw: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> VerificationView:
    """What matters of a batch Job and of those of `pods` that are its own."""
    metadata, spec, status = _map(raw, "metadata"), _map(raw, "spec"), _map(raw, "status")
    true = {str(item.get("type")): item for item in _maps(status, "conditions") if item.get("status") == "True"}
    failed = true.get("Failed", {})
    uid = str(metadata.get("uid", ""))
    views = (read_pod(pod, VERIFICATION_CONTAINER) for pod in pods)
    own = [view for view in views if view.owner_uid == uid]
    return VerificationView(
        name=str(metadata.get("name", "")),
        uid=uid,
        created_at=moment(str(metadata.get("creationTimestamp") or "")),
        started_at=moment(str(status.get("startTime") or "")),
        deleting="deletionTimestamp" in metadata,
        suspended=spec.get("suspend") is True,
        ended="Complete" in true or "Failed" in true,
        end_reason=str(failed.get("reason") or ""),
        end_message=str(failed.get("message") or ""),
        pods=sorted(own, key=lambda pod: (pod.created_at or datetime.max.replace(tzinfo=UTC), pod.name)),
    )


def is_owned(raw: Mapping[str, Any], uid: str) -> bool:
    """Whether the object in `raw` is controlled by the job with that uid."""
    return any(
        owner.get("controller") and owner.get("uid") == uid for owner in _maps(_map(raw, "metadata"), "ownerReferences")
    )


def _map(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, Mapping) else {}


def _maps(value: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    inner = value.get(key)
    return (item for item in inner if isinstance(item, Mapping)) if isinstance(inner, list) else iter(())


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0
