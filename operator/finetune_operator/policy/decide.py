"""What to do about a job next. Status says what has been done, the cluster what is there; both may be hours old.

An attempt is created only after the one before has ended in status and is gone from the cluster; it ends in status
before anything of it is deleted. So an operator that is killed between any two steps finds where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_api.outcome import Reason
from finetune_api.problem import Problem
from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.policy import conditions, deadline, endings, retry, ttl, verification
from finetune_operator.policy.failure_reason import Verdict, judge
from finetune_operator.policy.observed import PodView, WorkersView
from finetune_operator.policy.plan import Patience, Plan, Seen, Wishes
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.results import keep_checkpoint
from finetune_operator.policy.times import moment, rfc3339
from finetune_operator.policy.waiting import Activity, activity

LOOK_AGAIN_SECONDS = 5.0
"""When to look again for what an event should tell, in case it does not."""


def decide(seen: Seen, now: datetime, patience: Patience) -> Plan:
    """The next step for a job."""
    status = seen.status.model_copy(deep=True)
    status.observed_generation = seen.wishes.generation
    plan = Plan(status=status)
    if conditions.is_finished(status):
        _after_the_end(plan, seen, now, patience)
    elif attempt_is_open(status):
        _during_an_attempt(plan, seen, now, patience)
    else:
        _between_attempts(plan, seen, now, patience)
    return plan


def attempt_is_open(status: FineTuneJobStatus) -> bool:
    """Whether the current attempt was created and has not ended, as far as status knows."""
    ended = status.attempts[-1].number if status.attempts else 0
    return status.attempt is not None and status.attempt > ended


def next_attempt(status: FineTuneJobStatus) -> int:
    """Number of the attempt after the last one that has ended."""
    return (status.attempts[-1].number if status.attempts else 0) + 1


def note_created(plan: Plan, workers: WorkersView, seen: Seen, now: datetime, patience: Patience) -> None:
    """Enter the attempt that was just created, or found to have been, into the plan's status."""
    status = plan.status
    status.attempt = workers.attempt
    status.attempt_start_time = rfc3339(workers.created_at or now)
    status.start_time = status.start_time or status.attempt_start_time
    status.progress = None
    _note_activity(plan, workers, (), seen, now, patience, reported=None)


def note_hindered(plan: Plan, reason: str, message: str, seen: Seen, now: datetime) -> None:
    """Enter why the next attempt could not be created just now."""
    conditions.progressing(plan.status, Phase.PENDING, reason, message, now=now, generation=seen.wishes.generation)


def _after_the_end(plan: Plan, seen: Seen, now: datetime, patience: Patience) -> None:
    workers, verify = seen.workers, seen.wishes.verify
    expiry = ttl.expiry(plan.status, seen.wishes.ttl_seconds_after_finished)
    if verification.awaits_verdict(plan.status, verify=verify):
        verification.follow(plan, seen, now, patience)
        # Nobody would hear the verdict of a job that is gone.
        expiry = None if verification.awaits_verdict(plan.status, verify=verify) else expiry
    elif expiry is not None and now >= expiry:
        plan.delete_job = True
        return
    plan.again_at = min((time for time in (plan.again_at, expiry) if time is not None), default=None)
    plan.keep_config_map = verify
    if workers is None or workers.deleting:
        return
    # Pods that have ended hold nothing and keep their logs; those that have not must go.
    plan.release = any(not pod.ended for pod in seen.pods) or not (seen.pods or workers.ended)
    if not plan.release and any(pod.holds_machine for pod in seen.pods):
        # The trainer has ended, its pod has not: in a moment it will, unless a container beside it goes on for ever.
        patience_ends = (moment(plan.status.completion_time) or now) + timedelta(seconds=patience.group_end_seconds)
        plan.release = now >= patience_ends
        if not plan.release:
            plan.again_at = min(patience_ends, plan.again_at or patience_ends)


def _during_an_attempt(plan: Plan, seen: Seen, now: datetime, patience: Patience) -> None:
    status, wishes, workers = plan.status, seen.wishes, seen.workers
    if workers is None or workers.deleting:
        verdict: Verdict | datetime | None = endings.deleted(status.attempt, seen.pods)
        pods: Sequence[PodView] = ()
    else:
        pods = [pod for pod in seen.pods if pod.owner_uid == workers.uid]
        verdict = judge(workers, pods, now=now, noticed=seen.noticed, group_end_seconds=patience.group_end_seconds)
        plan.ending = isinstance(verdict, datetime)
    limit = wishes.active_deadline_seconds
    if isinstance(verdict, Verdict) and verdict.succeeded:
        endings.succeed(status, verdict, now=now, generation=wishes.generation)
        verification.begin(plan, seen, now)
        plan.again_at = now
    elif isinstance(verdict, Verdict) and not verdict.retryable:
        endings.end_attempt(status, verdict, now)
        endings.fail(status, verdict.reason, verdict.message, now=now, generation=wishes.generation)
        plan.again_at = now
    elif wishes.suspend:
        endings.end_attempt(status, endings.suspended(), now)
        conditions.progressing(
            status,
            Phase.SUSPENDED,
            OperatorReason.SUSPENDED,
            "The job is suspended; its workers save a checkpoint and end.",
            now=now,
            generation=wishes.generation,
        )
        plan.again_at = now
    elif limit is not None and deadline.exceeded(status, limit, now):
        sentence = deadline.deadline_sentence(limit)
        endings.end_attempt(status, endings.stopped(OperatorReason.DEADLINE_EXCEEDED, sentence), now)
        endings.fail(status, OperatorReason.DEADLINE_EXCEEDED, sentence, now=now, generation=wishes.generation)
        plan.again_at = now
    elif isinstance(verdict, Verdict):
        endings.end_attempt(status, verdict, now)
        _retry_or_fail(plan, verdict, seen, now, patience)
    elif workers is not None:
        # One that its queue has stopped goes on from what its pods saved before they went.
        _keep_checkpoints(status, pods)
        _note_activity(plan, workers, pods, seen, now, patience, reported=seen.reported)
        if seen.progress is not None:
            status.progress = seen.progress
        times = [plan.again_at, verdict, deadline.deadline(status, limit)]
        plan.again_at = min((time for time in times if time is not None), default=None)


def _between_attempts(plan: Plan, seen: Seen, now: datetime, patience: Patience) -> None:
    status, wishes = plan.status, seen.wishes
    if seen.unrecorded is not None:
        note_created(plan, seen.unrecorded, seen, now, patience)
        plan.again_at = now
        return
    left = [pod for pod in seen.pods if pod.holds_machine]
    # The checkpoint of an attempt that was told to stop is known only now.
    _keep_checkpoints(status, seen.pods)
    if seen.workers is not None or left:
        plan.release = seen.workers is not None and not seen.workers.deleting
        plan.again_at = now + timedelta(seconds=LOOK_AGAIN_SECONDS)
        names = ", ".join(pod.name for pod in left[:3]) or (seen.workers.name if seen.workers else "")
        going = f"what is left of it is on its way out: {names}."
        orphan = next((pod.name for pod in left if not pod.owner_uid and not pod.deleting), None)
        if orphan is not None:
            going = f"nobody will delete {orphan}, since its owner is gone: `kubectl delete pod {orphan}`."
        conditions.progressing(
            status,
            Phase.SUSPENDED if wishes.suspend else Phase.RETRYING,
            OperatorReason.SUSPENDED if wishes.suspend else OperatorReason.PODS_STILL_ENDING,
            f"Attempt {status.attempt} has ended; {going}",
            now=now,
            generation=wishes.generation,
        )
        return
    if wishes.suspend:
        sentence = "The job is suspended and holds no machines: set suspend: false to go on"
        where = f" from the checkpoint of step {status.checkpoint.step}" if status.checkpoint else ""
        conditions.at_rest(
            status,
            Phase.SUSPENDED,
            OperatorReason.SUSPENDED,
            f"{sentence}{where}.",
            now=now,
            generation=wishes.generation,
        )
        return
    if wishes.problems:
        conditions.stalled(
            status,
            Phase.PENDING,
            Reason.INVALID_SPEC,
            problems_sentence(wishes.problems),
            now=now,
            generation=wishes.generation,
        )
        return
    limit = wishes.active_deadline_seconds
    if limit is not None and deadline.exceeded(status, limit, now):
        endings.fail(
            status,
            OperatorReason.DEADLINE_EXCEEDED,
            deadline.deadline_sentence(limit),
            now=now,
            generation=wishes.generation,
        )
        plan.again_at = now
        return
    if retry.exhausted(status.failures or 0, wishes.backoff_limit):
        # The limit was lowered since the last attempt ended.
        endings.give_up(status, wishes.backoff_limit, now=now, generation=wishes.generation)
        plan.again_at = now
        return
    due = _next_attempt_at(status, patience)
    if due is not None and due > now:
        last = status.attempts[-1]
        _note_retrying(plan, f"{last.reason}: {last.message}", due, now, wishes)
        return
    plan.create = next_attempt(status)


def _note_activity(
    plan: Plan,
    workers: WorkersView,
    pods: Sequence[PodView],
    seen: Seen,
    now: datetime,
    patience: Patience,
    *,
    reported: Phase | None,
) -> None:
    wishes = seen.wishes
    doing: Activity = activity(
        workers,
        pods,
        queue=wishes.queue,
        now=now,
        pods_expected_seconds=patience.pods_expected_seconds,
        reported=reported,
    )
    since = workers.resumed_at or workers.created_at or now
    deadline.account(plan.status, active=not workers.suspended, since=now if workers.suspended else since)
    plan.again_at = doing.again_at
    if wishes.problems:
        # What runs goes on: it was made of a spec that was valid. The change is reported and no attempt made of it.
        conditions.stalled(
            plan.status,
            doing.phase,
            Reason.INVALID_SPEC,
            f"{problems_sentence(wishes.problems)} The current attempt goes on as it began.",
            now=now,
            generation=wishes.generation,
        )
        return
    note = f" Note: {wishes.notices[0]}" if wishes.notices else ""
    more = f" ({len(wishes.notices) - 1} more notes: see the events.)" if len(wishes.notices) > 1 else ""
    conditions.progressing(
        plan.status, doing.phase, doing.reason, doing.message + note + more, now=now, generation=wishes.generation
    )


def _retry_or_fail(plan: Plan, verdict: Verdict, seen: Seen, now: datetime, patience: Patience) -> None:
    status, wishes = plan.status, seen.wishes
    plan.again_at = now
    if retry.exhausted(status.failures or 0, wishes.backoff_limit):
        endings.give_up(status, wishes.backoff_limit, now=now, generation=wishes.generation)
        return
    due = _next_attempt_at(status, patience) or now
    _note_retrying(plan, f"{verdict.reason}: {verdict.message}", due, now, wishes)
    plan.again_at = now


def _note_retrying(plan: Plan, cause: str, due: datetime, now: datetime, wishes: Wishes) -> None:
    number = plan.status.attempts[-1].number
    plan.again_at = due
    conditions.progressing(
        plan.status,
        Phase.RETRYING,
        plan.status.attempts[-1].reason or Phase.RETRYING,
        f"Attempt {number} ended with {cause} Attempt {number + 1} starts at {rfc3339(due)} at the earliest, from the "
        "last complete checkpoint.",
        now=now,
        generation=wishes.generation,
    )


def _keep_checkpoints(status: FineTuneJobStatus, pods: Sequence[PodView]) -> None:
    for pod in pods:
        keep_checkpoint(status, pod.last_words.checkpoint if pod.last_words else None)


def _next_attempt_at(status: FineTuneJobStatus, patience: Patience) -> datetime | None:
    return retry.next_attempt_at(
        status.attempts, base_seconds=patience.retry_base_seconds, limit_seconds=patience.retry_limit_seconds
    )


def problems_sentence(problems: Sequence[Problem]) -> str:
    """The first problem, and how many more there are."""
    more = f" ({len(problems) - 1} more: see the events.)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"
