"""How an attempt ended, judged over all of its pods together: when one worker fails, the others fail in its wake.

A trainer's own sentence weighs most, then what the cluster says of the pod, then bare exit codes; echoes of another
worker's end weigh least. Below 128 only the user can mend it, from 128 on another attempt may succeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from itertools import islice

from finetune_api.outcome import (
    EXIT_CODES,
    FIRST_RETRYABLE_EXIT_CODE,
    CheckpointResult,
    Reason,
    TerminationMessage,
    is_retryable,
)
from finetune_api.status import Adapter
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.pod_ends import disk_full, never_started, out_of_memory, quoted
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.results import adapter_of
from finetune_operator.policy.start_errors import NEVER_STARTED, image_is_at_fault
from finetune_operator.policy.times import CLOCK_TOLERANCE, after

OOM_KILLED = "OOMKilled"
"""The kubelet's word for the end of a container of which the kernel killed a process for want of memory: at its own
limit, or because its node had no more."""
ANEW = "and create the FineTuneJob anew"
_NAMED_WORKERS = 3
LAST_SIGNAL = 64
KILLED = 137
"""128 + SIGKILL, the exit code of a container that was killed."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The end of an attempt."""

    succeeded: bool
    reason: str
    message: str
    exit_code: int | None = None
    retryable: bool = False
    counted: bool = True
    """Whether it counts against backoffLimit."""
    doubtful: bool = False
    """Job or node may be to blame: tried once more, and the same end again is the job's."""
    node: str | None = None
    """Where the worker ran that caused it."""
    words: TerminationMessage | None = None
    """What rank 0 said, after success."""
    checkpoint: CheckpointResult | None = None


class _Weight(IntEnum):
    """How surely an end is the cause; the smallest wins, among equals the earliest, then the lowest rank."""

    SAID_USER = 0
    OUT_OF_MEMORY = 1
    DISK_FULL = 2
    DISRUPTED = 3
    SAID_WORLD = 4
    NEVER_STARTED = 5
    SIGNAL = 6
    SAID_UNEXPECTED = 7
    SILENT = 8
    ECHO = 9


_MAY_BE_AN_ECHO = (_Weight.SIGNAL, _Weight.SAID_UNEXPECTED, _Weight.ECHO)
"""Ends that a worker may come to because another one was lost."""


def judge(
    pytorch_job: PyTorchJobView,
    pods: Sequence[PodView],
    *,
    now: datetime,
    group_end_seconds: float,
    noticed: datetime | None = None,
) -> Verdict | datetime | None:
    """How the attempt ended; None while it goes on; the time at which to judge again when its end has begun.

    Args:
        pytorch_job: the attempt's PyTorchJob.
        pods: those of its pods that exist.
        now: the present.
        group_end_seconds: how long the other pods may take to end once the end of the first was noticed (seconds).
        noticed: when the operator first saw that the end has begun; None if it sees that now.
    """
    published = _published(next((pod for pod in pods if pod.index == 0), None))
    if pytorch_job.held or (published is not None and any(_left_over(pod, pytorch_job) for pod in pods)):
        # Stopped by a queue while it published, and done in the time that it was given: nothing is left to do.
        return published
    pods = [pod for pod in pods if not _left_over(pod, pytorch_job)]
    if not _has_begun_to_end(pytorch_job, pods):
        return None
    # Counted from when we noticed: the times of the pods come from the clocks of their nodes.
    decide_at = after(min(noticed or now, now), group_end_seconds)
    if _others_may_end(pytorch_job, pods) and now < decide_at:
        return decide_at
    if published is not None:
        return published
    checkpoint = newest_checkpoint(pods)
    failed = [pod for pod in pods if not pod.succeeded and (pod.ended or pod.deleting)]
    if not failed:
        return _without_failed_pod(pytorch_job, pods, checkpoint)
    cause = min(failed, key=lambda pod: (_weight(pod), pod.ended_at is None, pod.ended_at or now, pod.index))
    return _verdict(cause, checkpoint, complete=len(pods) >= pytorch_job.nodes)


def newest_checkpoint(pods: Sequence[PodView]) -> CheckpointResult | None:
    """The newest of the checkpoints that pods name in their last words."""
    saved = [pod.last_words.checkpoint for pod in pods if pod.last_words and pod.last_words.checkpoint]
    return max(saved, key=lambda found: found.step, default=None)


def _left_over(pod: PodView, pytorch_job: PyTorchJobView) -> bool:
    """Whether `pod` was deleted by the suspension that is over now, and only takes its time to go."""
    deleted_at, resumed_at = pod.deleted_at, pytorch_job.resumed_at
    return deleted_at is not None and resumed_at is not None and deleted_at <= resumed_at


def _has_begun_to_end(pytorch_job: PyTorchJobView, pods: Sequence[PodView]) -> bool:
    """Whether the attempt is ending. Workers that succeed wait for the others."""
    all_over = bool(pods) and all(pod.ended for pod in pods)
    return pytorch_job.ended or any(
        pod.deleting or (pod.ended and (not pod.succeeded or _adapter(pod) is not None or all_over)) for pod in pods
    )


def _others_may_end(pytorch_job: PyTorchJobView, pods: Sequence[PodView]) -> bool:
    """Whether pods that have not ended may yet say what the cause was.

    Where one is being deleted, nothing is waited for: once it is gone the training operator makes another in its place,
    and then nobody could tell that it was taken away. After the end of a PyTorchJob it makes no more.
    """
    is_replaced = not pytorch_job.ended and any(pod.deleting for pod in pods)
    return any(not pod.ended for pod in pods) and not is_replaced


def _adapter(pod: PodView | None) -> Adapter | None:
    words = pod.last_words if pod is not None and pod.index == 0 and pod.ended else None
    return adapter_of(words) if words is not None else None


def _published(lead: PodView | None) -> Verdict | None:
    adapter = _adapter(lead)
    if adapter is None or lead is None or lead.last_words is None:
        return None
    return Verdict(
        succeeded=True,
        reason=OperatorReason.SUCCEEDED,
        message=f"The adapter is at {adapter.uri}.{contradiction(lead.exit_code, None)}",
        exit_code=recorded(lead.exit_code),
        words=lead.last_words,
        checkpoint=lead.last_words.checkpoint,
    )


def _ended_at_its_resumption(pytorch_job: PyTorchJobView) -> bool:
    """Whether it was over as soon as it had been let go on; both times are by the training operator's clock."""
    resumed_at, ended_at = pytorch_job.resumed_at, pytorch_job.ended_at
    return resumed_at is not None and (ended_at is None or ended_at <= resumed_at + CLOCK_TOLERANCE)


def _without_failed_pod(
    pytorch_job: PyTorchJobView, pods: Sequence[PodView], checkpoint: CheckpointResult | None
) -> Verdict:
    if pytorch_job.end == "Failed" and len(pods) < pytorch_job.nodes:
        there = {pod.index for pod in pods}
        # Lazily: whoever may edit the PyTorchJob may ask for billions.
        missing = (str(index) for index in range(pytorch_job.nodes) if index not in there)
        gone = ", ".join(islice(missing, _NAMED_WORKERS))
        more = " and more" if next(missing, None) is not None else ""
        return Verdict(
            succeeded=False,
            reason=OperatorReason.DISRUPTED,
            message=f"Nothing is left of worker {gone}{more} that could say why; this does not count as a failure.",
            retryable=True,
            counted=False,
            checkpoint=checkpoint,
        )
    text = quoted(pytorch_job.end_message).rstrip(".") or "it gave no reason"
    if pytorch_job.end == "Failed" and _ended_at_its_resumption(pytorch_job):
        # A pod that the suspension deletes, and that is still there at the resumption, counts as failed for it.
        return Verdict(
            succeeded=False,
            reason=OperatorReason.DISRUPTED,
            message="The training operator ended the attempt after a suspension although none of its pods had failed "
            f"({text}); this does not count as a failure.",
            retryable=True,
            counted=False,
            checkpoint=checkpoint,
        )
    if pytorch_job.end == "Failed":
        return Verdict(
            succeeded=False,
            reason=OperatorReason.WORKERS_FAILED,
            message=f"The training operator ended the attempt: {text}.",
            retryable=True,
            checkpoint=checkpoint,
        )
    return Verdict(
        succeeded=False,
        reason=OperatorReason.RESULT_MISSING,
        message="The workers ended without an error but left no result: the next attempt looks for a finished adapter "
        "first. If it comes back, check that workers.image is a trainer of this operator.",
        exit_code=0,
        retryable=True,
        checkpoint=checkpoint,
    )


def _weight(pod: PodView) -> _Weight:
    words, code = pod.last_words, pod.exit_code
    said_user = words is not None and _is_users(words)
    if pod.ended_reason == OOM_KILLED and pod.init_container is None and not said_user:
        return _Weight.OUT_OF_MEMORY
    if pod.disk_limit is not None and not said_user:
        return _Weight.DISK_FULL
    if words is not None and not words.succeeded:
        if words.collateral or words.reason is Reason.PEER_FAILED:
            return _Weight.DISRUPTED if _taken(pod) else _Weight.ECHO
        if _is_users(words):
            return _Weight.SAID_USER
        if words.reason is Reason.TERMINATED or _taken(pod):
            return _Weight.DISRUPTED
        return _Weight.SAID_UNEXPECTED if words.reason in (None, Reason.INTERNAL_ERROR) else _Weight.SAID_WORLD
    if _taken(pod):
        return _Weight.DISRUPTED
    if pod.init_container is not None or pod.ended_reason in NEVER_STARTED:
        return _Weight.NEVER_STARTED
    return _Weight.SIGNAL if code is None or is_retryable(code) else _Weight.SILENT


def _is_users(words: TerminationMessage) -> bool:
    return (
        not words.collateral
        and not words.succeeded
        and words.reason is not None
        and not is_retryable(EXIT_CODES[words.reason])
    )


def _taken(pod: PodView) -> bool:
    """Whether the cluster or a person took the pod away."""
    return pod.disruption is not None or pod.deleting


def _verdict(pod: PodView, checkpoint: CheckpointResult | None, *, complete: bool) -> Verdict:
    weight, words, code = _weight(pod), pod.last_words, pod.exit_code
    who = f"Worker {pod.index}"
    retryable, counted, doubtful = True, True, False
    if weight is _Weight.OUT_OF_MEMORY:
        reason, message = str(Reason.OUT_OF_MEMORY), out_of_memory(who, pod, ANEW)
        retryable = doubtful = not pod.memory_is_its_own
    elif weight is _Weight.DISK_FULL and pod.disk_limit is not None:
        reason, retryable = str(Reason.DISK_FULL), False
        message = disk_full(who, pod.disk_limit, ANEW)
    elif weight is _Weight.DISRUPTED:
        reason, counted = str(OperatorReason.DISRUPTED), False
        message = f"{who} was taken away by the cluster ({quoted(_disruption(pod))}); this does not count as a failure."
    elif words is not None and words.reason is not None:
        reason, retryable = str(words.reason), is_retryable(EXIT_CODES[words.reason])
        message = (words.message or f"{who} failed.") + contradiction(code, words.reason)
        code = code if code is not None else EXIT_CODES[words.reason]
    elif weight is _Weight.NEVER_STARTED:
        reason, message = str(OperatorReason.TRAINER_NOT_STARTED), never_started(who, pod)
        retryable = pod.init_container is not None or not image_is_at_fault(pod.ended_message)
    elif weight is _Weight.SILENT:
        reason, retryable = str(OperatorReason.TRAINER_CRASHED), False
        message = (
            f"{who} ended with exit code {code} and {_did_not_say_why(pod)}: read the last lines of `kubectl logs "
            f"{pod.name}`, and check that workers.image is a trainer of this operator."
        )
    else:
        reason, message = str(OperatorReason.TRAINER_CRASHED), _crashed(who, pod)
    if not complete and weight in _MAY_BE_AN_ECHO:
        # Nobody else can say what became of a worker that is gone altogether.
        counted = False
        message += " A worker is gone that may have been the cause, so this does not count as a failure."
    return Verdict(
        succeeded=False,
        reason=reason,
        message=message,
        exit_code=recorded(code),
        retryable=retryable,
        counted=counted,
        doubtful=doubtful,
        node=pod.node,
        checkpoint=checkpoint,
    )


def _crashed(who: str, pod: PodView) -> str:
    code = pod.exit_code
    how = f"with exit code {code}" if code is not None else f"({quoted(pod.ended_message or pod.ended_reason)})"
    likely = " (killed, maybe for want of memory)" if code == KILLED else ""
    why = "could not say why" if pod.last_words is None else _did_not_say_why(pod)
    return (
        f"{who} ended {how}{likely} and {why}; another attempt may succeed. If it comes back, report it with the last "
        f"lines of `kubectl logs {pod.name}`."
    )


def _did_not_say_why(pod: PodView) -> str:
    if pod.last_words is None:
        return "did not say why"
    if pod.last_words.succeeded:
        return "said that it had succeeded, but named no adapter"
    said = quoted(pod.last_words.message)
    return f"gave no reason but this ({said})" if said else "gave no reason"


def contradiction(code: int | None, reason: Reason | None) -> str:
    """What to add to last words with that reason, None for success, where the exit code says something else."""
    if code is None:
        return ""
    if reason is None:
        differs = code != 0
    else:
        # One that had spoken already may have been killed by a signal: that contradicts nothing.
        killed = FIRST_RETRYABLE_EXIT_CODE < code <= FIRST_RETRYABLE_EXIT_CODE + LAST_SIGNAL
        differs = code == 0 or (is_retryable(code) != is_retryable(EXIT_CODES[reason]) and not killed)
    return f" (Its container ended with exit code {code}, which says otherwise.)" if differs else ""


def recorded(code: int | None) -> int | None:
    """An exit code, where it is one that status can hold."""
    return code if code is not None and 0 <= code <= 255 else None


def _disruption(pod: PodView) -> str:
    if pod.disruption:
        return pod.disruption
    return "its pod was deleted" if pod.deleting else "it was told to stop"
