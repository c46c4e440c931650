"""What to do about a job next. Status says what has been done, the cluster what is there; both may be hours old.

An attempt is created only after the one before has ended in status and is gone from the cluster; it ends in status
before anything of it is deleted. So an operator that is killed between any two steps finds where it was.
"""

from __future__ import annotations

from datetime import datetime

from finetune_api.status import Phase
from finetune_operator.policy import advance, deadline, endings, retry, ttl, verification
from finetune_operator.policy.between import between_attempts
from finetune_operator.policy.conditions import ConditionWriter, is_finished
from finetune_operator.policy.failure_reason import Verdict, judge, newest_checkpoint
from finetune_operator.policy.lifecycle import attempt_is_open, holds_back, next_attempt
from finetune_operator.policy.notes import (
    note_activity,
    note_blocked,
    note_created,
    note_retrying,
    problems_sentence,
)
from finetune_operator.policy.observed import owned
from finetune_operator.policy.plan import ObservedState, Plan, Timeouts
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.results import keep_checkpoint
from finetune_operator.policy.times import after, moment

__all__ = [
    "attempt_is_open",
    "decide",
    "holds_back",
    "next_attempt",
    "note_blocked",
    "note_created",
    "problems_sentence",
]


def decide(observed: ObservedState, now: datetime, timeouts: Timeouts) -> Plan:
    """The next step for a job."""
    # What is in it is replaced and never changed, so that a shallow copy will do.
    status = observed.status.model_copy()
    status.observed_generation = observed.desired.generation
    plan = Plan(conditions=ConditionWriter(status, now, observed.desired.generation))
    if is_finished(status):
        _after_the_end(plan, observed, now, timeouts)
    elif attempt_is_open(status):
        _during_an_attempt(plan, observed, now, timeouts)
    else:
        between_attempts(plan, observed, now, timeouts)
    return plan


def _after_the_end(plan: Plan, observed: ObservedState, now: datetime, timeouts: Timeouts) -> None:
    pytorch_job, verify = observed.pytorch_job, observed.desired.verify
    expiry = ttl.expiry(plan.status, observed.desired.ttl_seconds_after_finished)
    if verification.awaits_verdict(plan.status, verify=verify):
        verification.follow(plan, observed, now, timeouts)
        # Nobody would hear the verdict of a job that is gone.
        expiry = None if verification.awaits_verdict(plan.status, verify=verify) else expiry
    elif expiry is not None and now >= expiry:
        plan.delete_job = True
        return
    plan.look_again(expiry)
    plan.keep_config_map = verify
    if pytorch_job is None or pytorch_job.deleting:
        return
    # Pods that have ended hold nothing and keep their logs; those that have not must go.
    plan.release = any(not pod.ended for pod in observed.pods) or not (observed.pods or pytorch_job.ended)
    # It makes pods even for a job that has ended: one that a quota refused, as soon as another has ended, one in place
    # of a pod that goes, or all of them anew once its queue lets it go on.
    staying = sum(not pod.deleting for pod in observed.pods)
    may_make_pods = not pytorch_job.ended and (pytorch_job.held or staying < pytorch_job.nodes)
    if not plan.release and (may_make_pods or any(pod.holds_machine for pod in observed.pods)):
        # The trainer has ended, its pod has not: in a moment it will, unless a container beside it goes on for ever.
        ended_at = moment(plan.status.completion_time)
        # An end in the future is by another clock, and nobody knows how long ago it was.
        release_at = after(ended_at, timeouts.group_end_seconds) if ended_at is not None and ended_at <= now else now
        plan.release = now >= release_at
        if not plan.release:
            plan.look_again(release_at)


def _during_an_attempt(plan: Plan, observed: ObservedState, now: datetime, timeouts: Timeouts) -> None:
    status, pytorch_job = plan.status, observed.pytorch_job
    if observed.progress is not None:
        advance.note_report(status, observed.progress)
    if pytorch_job is None or pytorch_job.deleting:
        _end(plan, endings.deleted(status.attempt, owned(observed.pods)), observed, now, timeouts)
        return
    deadline.note_suspension(status, pytorch_job, now)
    pods = [pod for pod in observed.pods if pod.owner_uid == pytorch_job.uid]
    found = judge(pytorch_job, pods, now=now, noticed=observed.noticed, group_end_seconds=timeouts.group_end_seconds)
    if _end(plan, endings.final(found, status) if isinstance(found, Verdict) else None, observed, now, timeouts):
        return
    # One that its queue has stopped goes on from what its pods saved before they went.
    keep_checkpoint(status, newest_checkpoint(pods))
    note_activity(plan, pytorch_job, pods, observed, now, timeouts, reported=observed.reported)
    status.progress = observed.progress or status.progress
    plan.look_again(deadline.deadline(status, observed.desired.active_deadline_seconds))
    if isinstance(found, datetime):
        plan.ending = True
        plan.look_again(found)


def _end(plan: Plan, verdict: Verdict | None, observed: ObservedState, now: datetime, timeouts: Timeouts) -> bool:
    """End the attempt, and maybe the job, where that is due; whether it was.

    What the attempt brought about itself counts more than what was asked for meanwhile, unless it would only lead to
    another attempt.
    """
    status, desired = plan.status, observed.desired
    limit = desired.active_deadline_seconds
    if verdict is not None and verdict.succeeded:
        endings.succeed(plan.conditions, verdict)
        verification.begin(plan, observed)
    elif verdict is not None and not verdict.retryable:
        endings.end_attempt(status, verdict, now)
        plan.conditions.failed(verdict.reason, verdict.message)
    elif desired.suspend:
        endings.end_attempt(status, endings.suspended(), now)
        sentence = "The job is suspended; its workers save a checkpoint and end."
        plan.conditions.progressing(Phase.SUSPENDED, OperatorReason.SUSPENDED, sentence)
    elif limit is not None and deadline.exceeded(status, limit, now):
        sentence = deadline.deadline_sentence(limit)
        endings.end_attempt(status, endings.stopped(OperatorReason.DEADLINE_EXCEEDED, sentence), now)
        plan.conditions.failed(OperatorReason.DEADLINE_EXCEEDED, sentence)
    elif verdict is not None:
        endings.end_attempt(status, verdict, now)
        if retry.exhausted(status.failures, desired.backoff_limit):
            endings.give_up(plan.conditions, desired.backoff_limit)
        else:
            note_retrying(plan, endings.next_attempt_at(status, timeouts, now) or now)
    else:
        return False
    # What is left of the attempt goes with the next look, once its end is written down.
    plan.again_at = now
    return True
