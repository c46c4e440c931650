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
from finetune_operator.policy import advance, conditions, deadline, endings, retry, ttl, verification
from finetune_operator.policy.failure_reason import Verdict, judge, newest_checkpoint
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.phase import shown_phase
from finetune_operator.policy.plan import DesiredState, ObservedState, Plan, Timeouts
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.results import keep_checkpoint
from finetune_operator.policy.times import after, believed_if_recent, moment, rfc3339
from finetune_operator.policy.waiting import Activity, activity

LOOK_AGAIN_SECONDS = 5.0
"""When to look again for what an event should tell, in case it does not."""


def decide(observed: ObservedState, now: datetime, timeouts: Timeouts) -> Plan:
    """The next step for a job."""
    status = observed.status.model_copy(deep=True)
    status.observed_generation = observed.desired.generation
    plan = Plan(status=status)
    if conditions.is_finished(status):
        _after_the_end(plan, observed, now, timeouts)
    elif attempt_is_open(status):
        _during_an_attempt(plan, observed, now, timeouts)
    else:
        _between_attempts(plan, observed, now, timeouts)
    return plan


def attempt_is_open(status: FineTuneJobStatus) -> bool:
    """Whether the current attempt was created and has not ended, as far as status knows."""
    ended = status.attempts[-1].number if status.attempts else 0
    return status.attempt is not None and status.attempt > ended


def next_attempt(status: FineTuneJobStatus) -> int:
    """Number of the attempt after the last one that has ended."""
    return (status.attempts[-1].number if status.attempts else 0) + 1


def holds_back(desired: DesiredState, status: FineTuneJobStatus, now: datetime) -> bool:
    """Whether no further attempt is made just now, for another reason than that one has to wait for its time.

    Nobody would notice then that one was made, just before the operator was stopped.
    """
    return (
        desired.suspend
        or bool(desired.problems)
        or deadline.exceeded(status, desired.active_deadline_seconds, now)
        or advance.is_stuck(status)
        or retry.exhausted(status.failures or 0, desired.backoff_limit)
    )


def note_created(
    plan: Plan, pytorch_job: PyTorchJobView, observed: ObservedState, now: datetime, timeouts: Timeouts
) -> None:
    """Enter the attempt that was just created, or found to have been, into the plan's status."""
    status = plan.status
    status.attempt = pytorch_job.attempt
    status.attempt_start_time = rfc3339(believed_if_recent(pytorch_job.created_at, now))
    status.start_time = status.start_time or status.attempt_start_time
    status.progress = None
    _note_activity(plan, pytorch_job, (), observed, now, timeouts, reported=None)


def note_hindered(plan: Plan, reason: str, message: str, observed: ObservedState, now: datetime) -> None:
    """Enter why the next attempt could not be created just now."""
    conditions.progressing(plan.status, Phase.PENDING, reason, message, now=now, generation=observed.desired.generation)


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
    plan.again_at = min((time for time in (plan.again_at, expiry) if time is not None), default=None)
    plan.keep_config_map = verify
    if pytorch_job is None or pytorch_job.deleting:
        return
    # Pods that have ended hold nothing and keep their logs; those that have not must go.
    plan.release = any(not pod.ended for pod in observed.pods) or not (observed.pods or pytorch_job.ended)
    if not plan.release and any(pod.holds_machine for pod in observed.pods):
        # The trainer has ended, its pod has not: in a moment it will, unless a container beside it goes on for ever.
        ended_at = moment(plan.status.completion_time)
        release_at = after(ended_at, timeouts.group_end_seconds) if ended_at is not None else now
        # An end in the future is by another clock, and nobody knows how long ago it was.
        plan.release = now >= release_at or (ended_at is not None and ended_at > now)
        if not plan.release:
            plan.again_at = min(release_at, plan.again_at or release_at)


def _during_an_attempt(plan: Plan, observed: ObservedState, now: datetime, timeouts: Timeouts) -> None:
    status, desired, pytorch_job = plan.status, observed.desired, observed.pytorch_job
    if pytorch_job is None or pytorch_job.deleting:
        verdict: Verdict | datetime | None = endings.deleted(status.attempt, observed.pods)
        pods: Sequence[PodView] = ()
    else:
        pods = [pod for pod in observed.pods if pod.owner_uid == pytorch_job.uid]
        verdict = judge(
            pytorch_job, pods, now=now, noticed=observed.noticed, group_end_seconds=timeouts.group_end_seconds
        )
        plan.ending = isinstance(verdict, datetime)
        verdict = endings.final(verdict, status) if isinstance(verdict, Verdict) else verdict
    if observed.progress is not None:
        advance.note_report(status, observed.progress)
    limit = desired.active_deadline_seconds
    if isinstance(verdict, Verdict) and verdict.succeeded:
        endings.succeed(status, verdict, now=now, generation=desired.generation)
        verification.begin(plan, observed, now)
        plan.again_at = now
    elif isinstance(verdict, Verdict) and not verdict.retryable:
        endings.end_attempt(status, verdict, now)
        endings.fail(status, verdict.reason, verdict.message, now=now, generation=desired.generation)
        plan.again_at = now
    elif desired.suspend:
        endings.end_attempt(status, endings.suspended(), now)
        conditions.progressing(
            status,
            Phase.SUSPENDED,
            OperatorReason.SUSPENDED,
            "The job is suspended; its workers save a checkpoint and end.",
            now=now,
            generation=desired.generation,
        )
        plan.again_at = now
    elif limit is not None and deadline.exceeded(status, limit, now):
        sentence = deadline.deadline_sentence(limit)
        endings.end_attempt(status, endings.stopped(OperatorReason.DEADLINE_EXCEEDED, sentence), now)
        endings.fail(status, OperatorReason.DEADLINE_EXCEEDED, sentence, now=now, generation=desired.generation)
        plan.again_at = now
    elif isinstance(verdict, Verdict):
        endings.end_attempt(status, verdict, now)
        _retry_or_fail(plan, verdict, observed, now, timeouts)
    elif pytorch_job is not None:
        # One that its queue has stopped goes on from what its pods saved before they went.
        keep_checkpoint(status, newest_checkpoint(pods))
        _note_activity(plan, pytorch_job, pods, observed, now, timeouts, reported=observed.reported)
        if observed.progress is not None:
            status.progress = observed.progress
        times = [plan.again_at, verdict, deadline.deadline(status, limit)]
        plan.again_at = min((time for time in times if time is not None), default=None)


def _between_attempts(plan: Plan, observed: ObservedState, now: datetime, timeouts: Timeouts) -> None:
    status, desired = plan.status, observed.desired
    if observed.unrecorded is not None:
        note_created(plan, observed.unrecorded, observed, now, timeouts)
        plan.again_at = now
        return
    if desired.suspend:
        advance.note_suspension(status)
    left = [pod for pod in observed.pods if pod.holds_machine]
    # The checkpoint of an attempt that was told to stop is known only now.
    keep_checkpoint(status, newest_checkpoint(observed.pods))
    if observed.pytorch_job is not None or left:
        plan.release = observed.pytorch_job is not None and not observed.pytorch_job.deleting
        plan.again_at = now + timedelta(seconds=LOOK_AGAIN_SECONDS)
        names = ", ".join(pod.name for pod in left[:3]) or (observed.pytorch_job.name if observed.pytorch_job else "")
        going = f"what is left of it is on its way out: {names}."
        orphan = next((pod.name for pod in left if not pod.owner_uid and not pod.deleting), None)
        if orphan is not None:
            going = f"nobody will delete {orphan}, since its owner is gone: `kubectl delete pod {orphan}`."
        conditions.progressing(
            status,
            Phase.SUSPENDED if desired.suspend else Phase.RETRYING,
            OperatorReason.SUSPENDED if desired.suspend else OperatorReason.PODS_STILL_ENDING,
            f"Attempt {status.attempt} has ended; {going}",
            now=now,
            generation=desired.generation,
        )
        return
    if desired.suspend:
        sentence = "The job is suspended and holds no machines: set suspend: false to go on"
        where = f" from the checkpoint of step {status.checkpoint.step}" if status.checkpoint else ""
        conditions.at_rest(
            status,
            Phase.SUSPENDED,
            OperatorReason.SUSPENDED,
            f"{sentence}{where}.",
            now=now,
            generation=desired.generation,
        )
        return
    if desired.problems:
        conditions.stalled(
            status,
            Phase.PENDING,
            Reason.INVALID_SPEC,
            problems_sentence(desired.problems),
            now=now,
            generation=desired.generation,
        )
        return
    limit = desired.active_deadline_seconds
    if limit is not None and deadline.exceeded(status, limit, now):
        endings.fail(
            status,
            OperatorReason.DEADLINE_EXCEEDED,
            deadline.deadline_sentence(limit),
            now=now,
            generation=desired.generation,
        )
        plan.again_at = now
        return
    if advance.is_stuck(status):
        # Only now: what the last pods said of their checkpoint may have come after the end was written down.
        sentence = advance.stuck_sentence(status)
        endings.fail(status, OperatorReason.NO_PROGRESS, sentence, now=now, generation=desired.generation)
        plan.again_at = now
        return
    if retry.exhausted(status.failures or 0, desired.backoff_limit):
        # The limit was lowered since the last attempt ended.
        endings.give_up(status, desired.backoff_limit, now=now, generation=desired.generation)
        plan.again_at = now
        return
    due = _next_attempt_at(status, timeouts, now)
    if due is not None and due > now:
        last = status.attempts[-1]
        _note_retrying(plan, f"{last.reason}: {last.message}", due, now, desired)
        return
    plan.create = next_attempt(status)
    # The first one's says what is trained.
    if status.attempt is not None and status.attempt > 1:
        plan.leftover_config_map = status.attempt


def _note_activity(
    plan: Plan,
    pytorch_job: PyTorchJobView,
    pods: Sequence[PodView],
    observed: ObservedState,
    now: datetime,
    timeouts: Timeouts,
    *,
    reported: Phase | None,
) -> None:
    desired = observed.desired
    active = not pytorch_job.held
    since = believed_if_recent(pytorch_job.resumed_at or pytorch_job.created_at, now) if active else now
    deadline.account(plan.status, active=active, since=since, now=now)
    phase, until = shown_phase(plan.status, pods, reported, reports_expected=observed.reports_expected, now=now)
    doing: Activity = activity(
        pytorch_job,
        pods,
        queue=desired.queue,
        now=now,
        since=moment(plan.status.active_since) or since,
        pods_expected_seconds=timeouts.pods_expected_seconds,
        phase=phase,
    )
    plan.again_at = doing.again_at or (until if doing.phase is phase else None)
    if desired.problems:
        # What runs goes on: it was made of a spec that was valid. The change is reported and no attempt made of it.
        conditions.stalled(
            plan.status,
            doing.phase,
            Reason.INVALID_SPEC,
            f"{problems_sentence(desired.problems)} The current attempt goes on as it began.",
            now=now,
            generation=desired.generation,
        )
        return
    note = f" Note: {desired.notices[0]}" if desired.notices else ""
    more = f" ({len(desired.notices) - 1} more notes: see the events.)" if len(desired.notices) > 1 else ""
    conditions.progressing(
        plan.status, doing.phase, doing.reason, doing.message + note + more, now=now, generation=desired.generation
    )


def _retry_or_fail(plan: Plan, verdict: Verdict, observed: ObservedState, now: datetime, timeouts: Timeouts) -> None:
    status, desired = plan.status, observed.desired
    plan.again_at = now
    if retry.exhausted(status.failures or 0, desired.backoff_limit):
        endings.give_up(status, desired.backoff_limit, now=now, generation=desired.generation)
        return
    due = _next_attempt_at(status, timeouts, now) or now
    _note_retrying(plan, f"{verdict.reason}: {verdict.message}", due, now, desired)
    plan.again_at = now


def _note_retrying(plan: Plan, cause: str, due: datetime, now: datetime, desired: DesiredState) -> None:
    number = plan.status.attempts[-1].number
    plan.again_at = due
    conditions.progressing(
        plan.status,
        Phase.RETRYING,
        plan.status.attempts[-1].reason or Phase.RETRYING,
        f"Attempt {number} ended with {cause} Attempt {number + 1} starts at {rfc3339(due)} at the earliest, from the "
        "last complete checkpoint.",
        now=now,
        generation=desired.generation,
    )


def _next_attempt_at(status: FineTuneJobStatus, timeouts: Timeouts, now: datetime) -> datetime | None:
    return retry.next_attempt_at(
        status.attempts, base_seconds=timeouts.retry_base_seconds, limit_seconds=timeouts.retry_limit_seconds, now=now
    )


def problems_sentence(problems: Sequence[Problem]) -> str:
    """The first problem, and how many more there are."""
    more = f" ({len(problems) - 1} more: see the events.)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"
