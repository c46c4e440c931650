"""What status says of an attempt that goes on, of one that could not be made, and of one that waits for its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from finetune_api.outcome import Reason
from finetune_api.problem import Problem
from finetune_api.status import ConditionType, Phase
from finetune_operator.names import KUEUE_QUEUE_LABEL
from finetune_operator.policy import deadline
from finetune_operator.policy.conditions import condition
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.phase import shown_phase
from finetune_operator.policy.plan import DesiredState, ObservedState, Plan, Timeouts
from finetune_operator.policy.times import believed_if_recent, moment, rfc3339
from finetune_operator.policy.waiting import activity


def note_created(
    plan: Plan, pytorch_job: PyTorchJobView, observed: ObservedState, now: datetime, timeouts: Timeouts
) -> None:
    """Enter the attempt that was just created, or found to have been, into the plan's status."""
    status = plan.status
    status.attempt = pytorch_job.attempt
    status.attempt_start_time = rfc3339(believed_if_recent(pytorch_job.created_at, now))
    status.start_time = status.start_time or status.attempt_start_time
    status.progress = None
    note_activity(plan, pytorch_job, (), observed, now, timeouts)


def note_blocked(plan: Plan, reason: str, message: str) -> None:
    """Enter why the next attempt could not be created just now, although it may be later."""
    plan.conditions.progressing(Phase.PENDING, reason, message)


def note_retrying(plan: Plan, due: datetime) -> None:
    """Enter why and when another attempt follows the one that has ended."""
    last = plan.status.attempts[-1]
    plan.conditions.progressing(
        Phase.RETRYING,
        last.reason or Phase.RETRYING,
        f"Attempt {last.number} ended with {last.reason}: {last.message} Attempt {last.number + 1} starts at "
        f"{rfc3339(due)} at the earliest, from the last complete checkpoint.",
    )


def note_activity(
    plan: Plan,
    pytorch_job: PyTorchJobView,
    pods: Sequence[PodView],
    observed: ObservedState,
    now: datetime,
    timeouts: Timeouts,
    *,
    reported: Phase | None = None,
) -> None:
    """Enter what the attempt does, since when it is active, and when to look again although nothing may happen."""
    status, desired = plan.status, observed.desired
    began_at = believed_if_recent(pytorch_job.resumed_at or pytorch_job.created_at, now)
    deadline.account(status, since=None if pytorch_job.held else began_at, now=now)
    phase, until = shown_phase(status, pods, reported, reports_expected=observed.reports_expected, now=now)
    succeeded = condition(status, ConditionType.SUCCEEDED)
    doing = activity(
        pytorch_job,
        pods,
        now=now,
        since=moment(status.active_since) or began_at,
        pods_expected_seconds=timeouts.pods_expected_seconds,
        phase=phase,
        before=succeeded.reason if succeeded is not None else None,
    )
    plan.again_at = doing.again_at or (until if doing.phase is phase else None)
    if desired.problems:
        # What runs goes on: it was made of a spec that was valid. The change is reported and no attempt made of it.
        sentence = f"{problems_sentence(desired.problems)} The current attempt goes on as it began."
        plan.conditions.stalled(doing.phase, Reason.INVALID_SPEC, sentence)
        return
    notices = [*_queue_notice(pytorch_job, desired), *desired.notices]
    note = f" Note: {problems_sentence(notices)}" if notices else ""
    plan.conditions.progressing(doing.phase, doing.reason, doing.message + note)


def problems_sentence(problems: Sequence[Problem]) -> str:
    """The first of them, and how many more there are."""
    more = f" ({len(problems) - 1} more: see the events.)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"


def _queue_notice(pytorch_job: PyTorchJobView, desired: DesiredState) -> Iterator[Problem]:
    """What an author should know whose job is to be in another queue than its attempt is."""
    if pytorch_job.queue != desired.queue:
        current = f"stays in the queue {pytorch_job.queue}" if pytorch_job.queue else "stays in no queue"
        other = f"the queue {desired.queue}" if desired.queue else "no queue"
        yield Problem(
            f"metadata.labels[{KUEUE_QUEUE_LABEL}]",
            f"the current attempt {current}, and {other} counts from the next attempt on: suspend the job and resume "
            "it to have it now, from the last checkpoint.",
        )
