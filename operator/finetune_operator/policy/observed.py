"""What was read of an attempt, or of a verification: its Job and pods, taken apart so that policies see no raw objects.

Everything here comes from others (kubelets, the training operator, whatever a tenant may write), so nothing is taken
for granted: what is missing or of another shape is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from finetune_api.outcome import TerminationMessage
from finetune_operator.names import (
    KUEUE_QUEUE_LABEL,
    PYTORCH_CONTAINER,
    REPLICA_INDEX_LABEL,
    VERIFICATION_CONTAINER,
    WORKER_REPLICA,
)
from finetune_operator.policy.evictions import EVICTED, DiskLimit, exceeded_limit
from finetune_operator.policy.times import after, moment

DISRUPTION_REASONS = (
    EVICTED,
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
REJECTED_PREFIX = "Pod was rejected: "
"""What `status.message` of a pod begins with that its node refused, whatever the reason."""

ENDED_PHASES = ("Succeeded", "Failed")
"""`status.phase` of a pod that has ended."""

ITS_TURN = ("PodInitializing", "ContainerCreating")
"""For what a container waits that has nothing to say."""

NAME_LIMIT = 253
"""Characters of the longest name of a node."""
ITEMS_LIMIT = 1000
"""Items of a list that are looked at. Real pods have tens of containers, and everything has fewer conditions; whoever
may write to an object can fill 1.4 MB with them, and all of it is read at every event."""
PYTORCH_KIND, BATCH_KIND = ("kubeflow.org/v1", "PyTorchJob"), ("batch/v1", "Job")
"""apiVersion and kind of what makes the pods of attempts, and of verifications."""
TEXT_LIMIT = 32 * 1024
"""Characters of a text that are kept: as many as the message of a condition may have."""


@dataclass(frozen=True, kw_only=True)
class PodView:
    """One worker's pod."""

    index: int
    """Number of the worker, from 0; worker 0 runs rank 0."""
    name: str
    uid: str
    owner_uid: str = ""
    """uid of the PyTorchJob or Job that controls it; empty for none."""
    phase: str
    created_at: datetime | None = None
    deleting: bool = False
    deleted_at: datetime | None = None
    """When somebody asked for that, by the API server's clock; None where it is not going, or does not say."""
    node: str | None = None
    """Name of the machine that it was assigned to."""
    scheduled_at: datetime | None = None
    """When it was, by the scheduler's clock."""
    disruption: str | None = None
    """Why the cluster ended it, as the cluster says it; None when it did not."""
    disk_limit: DiskLimit | None = None
    """Its own limit that it was evicted for, having written more than that to its node's disk."""
    memory_limit: str | None = None
    """Main memory that the container may use, as a Kubernetes quantity; None for all that its node has."""
    memory_request: str | None = None
    """Main memory that the node has set aside for the container, likewise."""
    unschedulable: str | None = None
    """Why no node takes it, as the scheduler says it."""
    waiting: str | None = None
    """Reason for which the container has not started, such as ImagePullBackOff."""
    waiting_message: str = ""
    init_container: str | None = None
    """Name of the init container that keeps the trainer's from starting, since it has failed or waits for something.
    We make none: a service mesh or a webhook adds them. What waits or has ended is this one then."""
    running: bool = False
    started_at: datetime | None = None
    """When the container began to run, by the clock of its node."""
    ended: bool = False
    exit_code: int | None = None
    """Exit code of the trainer's container; None until it has ended or when it never ran."""
    ended_reason: str = ""
    """The kubelet's word for the end of the container: Completed, Error, OOMKilled, StartError …"""
    ended_message: str = ""
    """The kubelet's or the container's own text about its end."""
    last_words: TerminationMessage | None = None
    ended_at: datetime | None = None
    """By the clock of its node."""

    @property
    def memory_is_its_own(self) -> bool:
        """Whether all memory up to its limit is set aside for it: then only its own use can have it killed for that."""
        return self.memory_limit is not None and self.memory_request in (None, self.memory_limit)

    @property
    def holds_machine(self) -> bool:
        """Whether it still takes up room on a node: a container beside the trainer's may go on after that one."""
        return self.phase not in ENDED_PHASES

    @property
    def succeeded(self) -> bool:
        """Whether it ended with exit code 0 and did not say that it had failed."""
        silent = self.last_words is None or self.last_words.succeeded
        return self.ended and silent and (self.exit_code == 0 or (self.exit_code is None and self.phase == "Succeeded"))


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
    suspended_at: datetime | None = None
    """When the training operator stopped it for that; None while it goes on."""
    has_run: bool = False
    """Its pods ran at some time, if not now."""
    pods_ended: int = 0
    """Pods that have ended, as the training operator last counted them: they are not watched."""
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
    queue: str | None = None
    """Kueue queue that it is in. Its job's label may name another one by now."""

    @property
    def ended(self) -> bool:
        """Whether the training operator is done with it."""
        return self.end is not None

    @property
    def held(self) -> bool:
        """Whether it waits for whoever suspended it. One that has ended waits for nobody, suspended or not."""
        return self.suspended and not self.ended


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
    queue: str | None = None
    """Kueue queue that it is in."""
    ended: bool = False
    end_reason: str = ""
    """The controller's word for a failure, such as DeadlineExceeded; empty after success."""
    end_message: str = ""
    pods: Sequence[PodView] = ()
    """Oldest first. One that a disruption ended is followed by another."""


def read_pod(raw: Mapping[str, Any], container_name: str = PYTORCH_CONTAINER) -> PodView:
    """What matters of a pod, and of its container of that name."""
    metadata, spec, status = _map(raw, "metadata"), _map(raw, "spec"), _map(raw, "status")
    phase = _text(status, "phase") or "Pending"
    conditions = {str(item.get("type")): item for item in _maps(status, "conditions")}
    container = _named(_maps(status, "containerStatuses"), container_name)
    state = _map(container, "state")
    running, ended = _map(state, "running"), _map(state, "terminated")
    text = _text(ended, "message")
    # Only where the trainer's own has never run: a sidecar among them ends when the pod does, with any exit code.
    held_by = _held_by(status) if "running" not in state and not ended else None
    stuck = _map(held_by, "state") if held_by is not None else state
    waiting, how = _map(stuck, "waiting"), _map(stuck, "terminated")
    scheduled = conditions.get("PodScheduled", {})
    resources = _map(_named(_maps(spec, "containers"), container_name), "resources")
    disk_limit = exceeded_limit(_text(status, "message")) if status.get("reason") == EVICTED else None
    return PodView(
        index=_number(_map(metadata, "labels").get(REPLICA_INDEX_LABEL)),
        name=_text(metadata, "name"),
        uid=_text(metadata, "uid"),
        owner_uid=_text(controller_of(raw), "uid"),
        phase=phase,
        created_at=_time(metadata, "creationTimestamp"),
        deleting="deletionTimestamp" in metadata,
        deleted_at=_deleted_at(metadata),
        node=_text(spec, "nodeName")[:NAME_LIMIT] or None,
        scheduled_at=_time(scheduled, "lastTransitionTime") if scheduled.get("status") == "True" else None,
        disruption=_disruption(status, conditions) if disk_limit is None else None,
        disk_limit=disk_limit,
        memory_limit=_quantity(_map(resources, "limits").get("memory")),
        memory_request=_quantity(_map(resources, "requests").get("memory")),
        unschedulable=_text(scheduled, "message") or "No node can take the pod."
        if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
        else None,
        waiting=_text(waiting, "reason") or None,
        waiting_message=_text(waiting, "message"),
        init_container=_text(held_by, "name") if held_by is not None else None,
        running="running" in state,
        started_at=_time(running or ended, "startedAt"),
        ended=bool(ended) or phase in ENDED_PHASES,
        exit_code=_exit_code(ended),
        ended_reason=_text(how, "reason") or _text(status, "reason"),
        ended_message=text or (_last_text(how) if held_by is not None else "") or _text(status, "message"),
        last_words=TerminationMessage.parse(text),
        ended_at=_time(how, "finishedAt") or _time(conditions.get("Ready", {}), "lastTransitionTime"),
    )


def _held_by(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The init container that has failed, or waits for something other than its turn."""
    for container in _maps(status, "initContainerStatuses"):
        state = _map(container, "state")
        reason = _map(state, "waiting").get("reason")
        if _exit_code(_map(state, "terminated")) or (reason and reason not in ITS_TURN):
            return container
    return None


def _last_text(how: Mapping[str, Any]) -> str:
    """What is known of the end of an init container, whose words nobody parses."""
    code = _exit_code(how)
    return _text(how, "message") or (f"exit code {code}" if code is not None else "")


def _disruption(status: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]) -> str | None:
    target = conditions.get("DisruptionTarget", {})
    if target.get("status") == "True":
        return _text(target, "message") or _text(target, "reason") or "DisruptionTarget"
    reason, message = _text(status, "reason"), _text(status, "message")
    named = reason in DISRUPTION_REASONS or reason.startswith(NO_ROOM_PREFIX) or message.startswith(REJECTED_PREFIX)
    if status.get("phase") == "Failed" and named:
        return ": ".join(filter(None, (reason, message)))
    return None


def read_pytorch_job(raw: Mapping[str, Any], attempt: int, *, edited: bool = False) -> PyTorchJobView:
    """What matters of a PyTorchJob."""
    metadata, spec, status = _map(raw, "metadata"), _map(raw, "spec"), _map(raw, "status")
    conditions = {str(item.get("type")): item for item in _maps(status, "conditions")}
    true = {name: item for name, item in conditions.items() if item.get("status") == "True"}
    suspension = conditions.get("Suspended", {})
    counts = _map(_map(status, "replicaStatuses"), WORKER_REPLICA)
    end = next((kind for kind in ("Failed", "Succeeded") if kind in true), None)
    over = true[end] if end is not None else {}
    return PyTorchJobView(
        name=_text(metadata, "name"),
        uid=_text(metadata, "uid"),
        attempt=attempt,
        nodes=_number(_map(_map(spec, "pytorchReplicaSpecs"), WORKER_REPLICA).get("replicas")),
        created_at=_time(metadata, "creationTimestamp"),
        deleting="deletionTimestamp" in metadata,
        suspended=_map(spec, "runPolicy").get("suspend") is True or "Suspended" in true,
        suspended_at=_time(suspension, "lastTransitionTime") if suspension.get("status") == "True" else None,
        has_run="Running" in conditions,
        pods_ended=sum(_number(counts.get(end)) for end in ("succeeded", "failed")),
        started_at=_time(status, "startTime"),
        resumed_at=_time(suspension, "lastTransitionTime") if suspension.get("status") == "False" else None,
        end=end,
        end_message=_text(over, "message"),
        ended_at=_time(status, "completionTime") or _time(over, "lastTransitionTime"),
        edited=edited,
        queue=_queue(metadata),
    )


def read_verification(raw: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> VerificationView:
    """What matters of a batch Job and of those of `pods` that are its own."""
    metadata, spec, status = _map(raw, "metadata"), _map(raw, "spec"), _map(raw, "status")
    true = {str(item.get("type")): item for item in _maps(status, "conditions") if item.get("status") == "True"}
    failed = true.get("Failed", {})
    uid = _text(metadata, "uid")
    views = (read_pod(pod, VERIFICATION_CONTAINER) for pod in pods)
    own = [view for view in views if view.owner_uid == uid]
    return VerificationView(
        name=_text(metadata, "name"),
        uid=uid,
        created_at=_time(metadata, "creationTimestamp"),
        started_at=_time(status, "startTime"),
        deleting="deletionTimestamp" in metadata,
        suspended=spec.get("suspend") is True,
        queue=_queue(metadata),
        ended="Complete" in true or "Failed" in true,
        end_reason=_text(failed, "reason"),
        end_message=_text(failed, "message"),
        pods=sorted(own, key=lambda pod: (pod.created_at or datetime.max.replace(tzinfo=UTC), pod.name)),
    )


def is_owned(raw: Mapping[str, Any], uid: str) -> bool:
    """Whether the object in `raw` is controlled by the one with that uid."""
    return controller_of(raw).get("uid") == uid


def owned(pods: Iterable[PodView]) -> Sequence[PodView]:
    """Those that something controls. Of the others nobody knows who made them, so nothing that they say counts."""
    return [pod for pod in pods if pod.owner_uid]


def is_made_by(raw: Mapping[str, Any], kind: tuple[str, str], name: str) -> bool:
    """Whether the object in `raw` is controlled by one of that apiVersion, kind and name, whatever its uid."""
    owner = controller_of(raw)
    return (owner.get("apiVersion"), owner.get("kind")) == kind and owner.get("name") == name


def controller_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reference to the owner that controls an object; the API server allows for one."""
    owners = _maps(_map(raw, "metadata"), "ownerReferences")
    return next((owner for owner in owners if owner.get("controller")), {})


def _named(containers: Iterable[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next((item for item in containers if item.get("name") == name), {})


def _text(value: Mapping[str, Any], key: str) -> str:
    """The text there, or the begin of one that is too long; empty where there is none."""
    return str(value.get(key) or "")[:TEXT_LIMIT]


def _time(value: Mapping[str, Any], key: str) -> datetime | None:
    """The time there; None where there is none."""
    return moment(_text(value, key))


def _deleted_at(metadata: Mapping[str, Any]) -> datetime | None:
    """deletionTimestamp is the end of the time that the object was given to go."""
    gone_at, grace = _time(metadata, "deletionTimestamp"), metadata.get("deletionGracePeriodSeconds")
    return after(gone_at, -_number(grace)) if gone_at is not None else None


def _exit_code(ended: Mapping[str, Any]) -> int | None:
    code = ended.get("exitCode")
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def _queue(metadata: Mapping[str, Any]) -> str | None:
    return _text(_map(metadata, "labels"), KUEUE_QUEUE_LABEL) or None


def _quantity(value: Any) -> str | None:
    return str(value)[:TEXT_LIMIT] if isinstance(value, str | int) and value else None


def _map(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, Mapping) else {}


def _maps(value: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    inner = value.get(key)
    first = islice(inner, ITEMS_LIMIT) if isinstance(inner, list) else ()
    return (item for item in first if isinstance(item, Mapping))


def _number(value: Any) -> int:
    try:
        return int(value)
    except (OverflowError, TypeError, ValueError):
        return 0
