"""Between two attempts, or before the first: what is left of the last one goes, then another is made, or none."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune_api.outcome import Reason
from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.policy import advance, deadline, endings, retry
from finetune_operator.policy.failure_reason import newest_checkpoint
from finetune_operator.policy.lifecycle import next_attempt
from finetune_operator.policy.notes import note_created, note_retrying, problems_sentence
from finetune_operator.policy.observed import PodView, PyTorchJobView, owned
from finetune_operator.policy.plan import ObservedState, Plan, Timeouts
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.results import keep_checkpoint
from finetune_operator.policy.times import after, moment, pause_seconds

LOOK_AGAIN_SECONDS = 5.0
"""When to look again at first for what an event should tell, in case it does not."""


def between_attempts(plan: Plan, observed: ObservedState, now: datetime, timeouts: Timeouts) -> None:
    """What to do about a job of which no attempt is open."""
    status, desired = plan.status, observed.desired
    if observed.unrecorded is not None:
        note_created(plan, observed.unrecorded, observed, now, timeouts)
        plan.again_at = now
        return
    if desired.suspend:
        advance.note_suspension(status)
    # The checkpoint of an attempt that was told to stop is known only now.
    keep_checkpoint(status, newest_checkpoint(owned(observed.pods)))
    ended_at = _ended_at(status)
    left = [pod for pod in observed.pods if pod.holds_machine and _was_there(pod, ended_at)]
    if observed.pytorch_job is not None or left:
        _clear_away(plan, observed, left, now)
    elif desired.suspend:
        _rest(plan)
    elif desired.problems:
        plan.conditions.stalled(Phase.PENDING, Reason.INVALID_SPEC, problems_sentence(desired.problems))
    elif _is_over(plan, observed, now):
        plan.again_at = now
    else:
        _go_on(plan, now, timeouts)


def _clear_away(plan: Plan, observed: ObservedState, left: list[PodView], now: datetime) -> None:
    """Let go of what there still is of the attempt that has ended."""
    suspend, pytorch_job = observed.desired.suspend, observed.pytorch_job
    plan.release = pytorch_job is not None and not pytorch_job.deleting
    # Somebody's finalizer may hold it for ever, and each look reads all of it.
    plan.again_at = after(now, pause_seconds(_ended_at(plan.status), now, least=LOOK_AGAIN_SECONDS))
    rest: Sequence[PodView | PyTorchJobView | None] = left or [pytorch_job]
    names = ", ".join(item.name for item in rest[:3] if item is not None)
    going = f"what is left of it is on its way out: {names}."
    orphan = next((pod.name for pod in left if not pod.owner_uid and not pod.deleting), None)
    if orphan is not None:
        going = f"nobody will delete {orphan}, since its owner is gone: `kubectl delete pod {orphan}`."
    plan.conditions.progressing(
        Phase.SUSPENDED if suspend else Phase.RETRYING,
        OperatorReason.SUSPENDED if suspend else OperatorReason.PODS_STILL_ENDING,
        f"Attempt {plan.status.attempt} has ended; {going}",
    )


def _ended_at(status: FineTuneJobStatus) -> datetime | None:
    return moment(status.attempts[-1].completion_time) if status.attempts else None


def _was_there(pod: PodView, ended_at: datetime | None) -> bool:
    """Whether it is a pod of the attempt that ended then.

    One without an owner is, if it was made before: the attempt's own pod had its name as long as it ran. One that came
    later only looks like it.
    """
    return bool(pod.owner_uid) or pod.created_at is None or ended_at is None or pod.created_at <= ended_at


def _rest(plan: Plan) -> None:
    saved = plan.status.checkpoint
    where = f" from the checkpoint of step {saved.step}" if saved is not None else ""
    plan.conditions.at_rest(
        Phase.SUSPENDED,
        OperatorReason.SUSPENDED,
        f"The job is suspended and holds no machines: set suspend: false to go on{where}.",
    )


def _is_over(plan: Plan, observed: ObservedState, now: datetime) -> bool:
    """End the job where no further attempt is allowed; whether it has ended."""
    status, desired = plan.status, observed.desired
    limit = desired.active_deadline_seconds
    if limit is not None and deadline.exceeded(status, limit, now):
        plan.conditions.failed(OperatorReason.DEADLINE_EXCEEDED, deadline.deadline_sentence(limit))
    elif advance.is_stuck(status):
        # Only now: what the last pods said of their checkpoint may have come after the end was written down.
        plan.conditions.failed(OperatorReason.NO_PROGRESS, advance.stuck_sentence(status))
    elif retry.exhausted(status.failures, desired.backoff_limit):
        # The limit was lowered since the last attempt ended.
        endings.give_up(plan.conditions, desired.backoff_limit)
    else:
        return False
    return True


def _go_on(plan: Plan, now: datetime, timeouts: Timeouts) -> None:
    """Make the next attempt once its time has come."""
    status = plan.status
    due = endings.next_attempt_at(status, timeouts, now)
    if due is not None and due > now:
        note_retrying(plan, due)
        plan.again_at = due
        return
    plan.create = next_attempt(status)
    # The first one's says what is trained.
    if status.attempt is not None and status.attempt > 1:
        plan.leftover_config_map = status.attempt
