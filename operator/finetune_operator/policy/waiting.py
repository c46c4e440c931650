"""What an attempt that has not ended is doing, or what it waits for: phase, reason, and one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_api.status import ConditionType, FineTuneJobStatus, Phase
from finetune_operator.policy.conditions import condition
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.pod_ends import quoted
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.times import after, believed

PULL_FAILURES = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
_CONFIGURATION = ("CreateContainerConfigError",)
_START = ("CreateContainerError", "RunContainerError", "CrashLoopBackOff", "PreCreateHookError", "PreStartHookError")
STUCK = (*PULL_FAILURES, *_CONFIGURATION, *_START)
"""Reasons for which a container waits that do not pass by themselves."""

POD_START_SECONDS = 600.0
"""How long a pod may take to begin to run before that is said (seconds): a large image is pulled in that time."""

WAITING_PHASES = (Phase.PENDING, Phase.QUEUED, Phase.STARTING, Phase.RETRYING)


@dataclass(frozen=True)
class Activity:
    """What an attempt does right now."""

    phase: Phase
    reason: str
    message: str
    again_at: datetime | None = None
    """When to look again although nothing may have happened."""


def activity(
    pytorch_job: PyTorchJobView,
    pods: Sequence[PodView],
    *,
    now: datetime,
    since: datetime,
    pods_expected_seconds: float,
    phase: Phase,
    before: str | None = None,
) -> Activity:
    """What the attempt does.

    Args:
        pytorch_job: the attempt's PyTorchJob.
        pods: those of its pods that exist.
        now: the present.
        since: when it became active, by our own clock.
        pods_expected_seconds: how long pods may be missing before that is said (seconds).
        phase: the one that it is in once all pods run.
        before: the reason that its condition has. What was said once is not taken back because of another clock.
    """
    what, nodes = f"Attempt {pytorch_job.attempt}", pytorch_job.nodes
    if pytorch_job.held:
        return Activity(Phase.QUEUED, OperatorReason.WAITING_FOR_QUOTA, _queued(pytorch_job))
    for find in (_unschedulable, _container_waits):
        found = find(pods, nodes)
        if found is not None:
            return found
    started = sum(pod.running or pod.ended for pod in pods)
    if pods and started >= nodes:
        workers_run = "the worker runs" if nodes == 1 else f"all {nodes} workers run"
        note = ""
        if pytorch_job.edited:
            note = (
                f" The PyTorchJob {pytorch_job.name} was edited by hand; the edit is left alone and the next attempt "
                "is made without it."
            )
        return Activity(phase, phase, f"{what}: {workers_run}.{note}")
    # The same words before and after the pods are there: that alone is not worth a write.
    so_far = (
        f"{what}: {started} of {nodes} workers run so far." if nodes > 1 else f"{what}: the worker is being started."
    )
    if len(pods) >= nodes:
        waiting = [pod for pod in pods if not (pod.running or pod.ended)]
        slowest = min(waiting, key=lambda pod: _start_due(pod, since, now), default=None)
        if slowest is None:  # an edited PyTorchJob of no pods
            return Activity(Phase.STARTING, Phase.STARTING, so_far)
        due = _start_due(slowest, since, now)
        if now < due and before != OperatorReason.PODS_NOT_STARTED:
            return Activity(Phase.STARTING, Phase.STARTING, so_far, again_at=due)
        return Activity(Phase.STARTING, OperatorReason.PODS_NOT_STARTED, _not_started(slowest))
    expected_at = after(since, pods_expected_seconds)
    if now < expected_at and before != OperatorReason.PODS_NOT_CREATED:
        return Activity(Phase.STARTING, Phase.STARTING, so_far, again_at=expected_at)
    return Activity(
        Phase.STARTING,
        OperatorReason.PODS_NOT_CREATED,
        f"{what}: {len(pods)} of {nodes} pods were created after {pods_expected_seconds:g} s. `kubectl describe "
        f"pytorchjob {pytorch_job.name}` says why: a quota, an admission policy, or a training operator that "
        "does not run.",
    )


def waits_for(status: FineTuneJobStatus) -> str | None:
    """Why the job does not train although it is meant to, in the word that its conditions have; None otherwise."""
    succeeded = condition(status, ConditionType.SUCCEEDED)
    return succeeded.reason if succeeded is not None and status.phase in WAITING_PHASES else None


def _queued(pytorch_job: PyTorchJobView) -> str:
    queue = pytorch_job.queue
    if queue and pytorch_job.has_run:
        return (
            f"Attempt {pytorch_job.attempt} was stopped by its queue {queue} and waits there until Kueue admits it "
            "again; it goes on from the last complete checkpoint."
        )
    if queue:
        return f"Attempt {pytorch_job.attempt} waits in the queue {queue} until Kueue admits it."
    return (
        f"The PyTorchJob {pytorch_job.name} was suspended by somebody else: set its spec.runPolicy.suspend to false to "
        "go on, or suspend this FineTuneJob to take it back."
    )


def _unschedulable(pods: Sequence[PodView], nodes: int) -> Activity | None:
    stuck = [pod.unschedulable for pod in pods if pod.unschedulable is not None]
    if not stuck:
        return None
    who = "the worker" if nodes == 1 else f"{len(stuck)} of {nodes} workers"
    return Activity(
        Phase.PENDING,
        OperatorReason.UNSCHEDULABLE,
        f"No machine can take {who} at present: {quoted(stuck[0])} It starts by itself once there "
        "is room; to ask for less, suspend the job, change workers and resume it.",
    )


def _start_due(pod: PodView, since: datetime, now: datetime) -> datetime:
    """By when it should run: from when it has its node, or without one exists, by whoever's clock can be believed."""
    there_at = believed(pod.scheduled_at or pod.created_at, earliest=since, now=now, otherwise=since)
    return after(there_at, POD_START_SECONDS)


def _not_started(pod: PodView) -> str:
    minutes = f"{POD_START_SECONDS / 60:.0f} minutes"
    if pod.node is None:
        return (
            f"Worker {pod.index} has had no node for {minutes}, and no scheduler says why: `kubectl describe pod "
            f"{pod.name}` names the scheduler, or the gate, that it waits for."
        )
    return (
        f"Worker {pod.index} was given a node and has not begun to run for {minutes}: its image is still being pulled, "
        "a volume, Secret or ConfigMap that it mounts is missing, or the node does not answer. `kubectl describe pod "
        f"{pod.name}` says which; it starts by itself once that is mended."
    )


def _container_waits(pods: Sequence[PodView], _nodes: int) -> Activity | None:
    sentences: tuple[tuple[Sequence[str], OperatorReason, Callable[[PodView], str]], ...] = (
        (PULL_FAILURES, OperatorReason.IMAGE_PULL_FAILED, _pull_failed),
        (_CONFIGURATION, OperatorReason.CONFIGURATION_MISSING, _configuration_missing),
        (_START, OperatorReason.CONTAINER_START_FAILED, _start_failed),
    )
    for reasons, reason, sentence in sentences:
        for pod in pods:
            if pod.waiting in reasons:
                return Activity(Phase.STARTING, reason, sentence(pod))
    return None


def _pull_failed(pod: PodView) -> str:
    why = f"({pod.waiting}: {quoted(pod.waiting_message)})"
    if pod.init_container is not None:
        return f"The image of {_whose(pod)} cannot be pulled {why}; it is tried again and again. {_NOT_OURS}"
    return (
        f"The image of worker {pod.index} cannot be pulled {why}. "
        "It is tried again and again; to change the image, suspend the job, set workers.image (or "
        "workers.imagePullSecrets) and resume it."
    )


def _configuration_missing(pod: PodView) -> str:
    return (
        f"{_capital(_whose(pod))} refers to a Secret or ConfigMap that cannot be used "
        f"({quoted(pod.waiting_message)}): create it in this namespace, and the worker starts by itself."
    )


def _start_failed(pod: PodView) -> str:
    why = f"({pod.waiting}: {quoted(pod.waiting_message)})"
    if pod.init_container is not None:
        return f"{_capital(_whose(pod))} cannot be started {why}. {_NOT_OURS}"
    return (
        f"The container of worker {pod.index} cannot be started {why}. It is tried again and again; mounts, the "
        "runtime class and the node itself are the usual causes."
    )


_NOT_OURS = "It is not this operator's: look at who adds it to pods, such as a service mesh."


def _whose(pod: PodView) -> str:
    worker = f"worker {pod.index}"
    return worker if pod.init_container is None else f"the init container {quoted(pod.init_container)} of {worker}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
