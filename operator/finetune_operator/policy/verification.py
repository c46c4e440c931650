"""The verification of a published adapter by a Job of its own: from success to a verdict that stays.

It begins when success is written down and never before. Status says that the Job was made, so one that somebody deletes
is not made again; who was stopped before that was written finds the Job by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_api.verification import VerificationMessage
from finetune_operator.policy.conditions import condition
from finetune_operator.policy.failure_reason import OOM_KILLED
from finetune_operator.policy.observed import VerificationView
from finetune_operator.policy.plan import ObservedState, Plan, Timeouts
from finetune_operator.policy.pod_ends import disk_full, never_started, out_of_memory, quoted
from finetune_operator.policy.reasons import VerificationReason
from finetune_operator.policy.start_errors import NEVER_STARTED
from finetune_operator.policy.times import after, believed, moment, pause_seconds, seconds_between
from finetune_operator.policy.waiting import STUCK

UNSEEN_SECONDS = 60.0
"""Time at first between two looks at a Job without a pod (seconds): of the Job itself no watch tells."""
LOOK_AGAIN_SECONDS = 5.0
"""When to look again, at first, for the end of a Job whose pod has ended, or whose time is over: no pod tells of it."""

BY_HAND = "`finetune verify` does the same by hand."

ELSEWHERE = "or run `finetune verify` where there is more"

_UNDECIDED = (VerificationReason.PENDING, VerificationReason.VERIFYING)


def is_asked_for(spec: Mapping[str, Any]) -> bool:
    """Whether the spec, as the API server holds it, asks for a verification."""
    output = spec.get("output")
    return isinstance(output, Mapping) and output.get("verify") is True


def awaits_verdict(status: FineTuneJobStatus, *, verify: bool) -> bool:
    """Whether the job has succeeded, was to be verified (`verify`), and there is no verdict yet."""
    succeeded = condition(status, ConditionType.SUCCEEDED)
    if not verify or succeeded is None or succeeded.status != "True":
        return False
    found = condition(status, ConditionType.VERIFIED)
    return found is None or found.reason in _UNDECIDED


def is_under_way(status: FineTuneJobStatus) -> bool:
    """Whether status says that the Job was made, and nothing of its end."""
    found = condition(status, ConditionType.VERIFIED)
    return found is not None and found.reason == VerificationReason.VERIFYING


def begin(plan: Plan, observed: ObservedState) -> None:
    """Enter into the plan of a job that has just succeeded that its verification comes next."""
    if awaits_verdict(plan.status, verify=observed.desired.verify):
        sentence = "The verification of the adapter comes next."
        plan.conditions.verified("Unknown", VerificationReason.PENDING, sentence)


def follow(plan: Plan, observed: ObservedState, now: datetime, timeouts: Timeouts) -> None:
    """What is to be done about the verification of a job that has succeeded, and whose verdict is awaited."""
    found = observed.verification
    if found is None:
        if plan.status.adapter is None:
            give_up(plan, "Status names no adapter that could be verified.")
        elif is_under_way(plan.status):
            give_up(plan, f"The Job of the verification was deleted by somebody else; {BY_HAND}")
        else:
            plan.verify = True
        return
    words = _words(found)
    if words is not None:
        _conclude(plan, words)
    elif found.deleting:
        give_up(plan, f"The Job {found.name} was deleted by somebody else; {BY_HAND}")
    elif found.ended:
        give_up(plan, _failure(found, plan.status))
    else:
        _note_progress(plan, found, now, timeouts)


def note_created(plan: Plan, found: VerificationView, now: datetime, timeouts: Timeouts) -> None:
    """Enter into the plan that the Job was just created, or found to have been."""
    _note_progress(plan, found, now, timeouts)


def note_blocked(plan: Plan, sentence: str, again_at: datetime, now: datetime, timeouts: Timeouts) -> None:
    """Enter into the plan why the Job could not be created just now; what lasts too long is given up."""
    since = moment(plan.status.completion_time) or now
    if seconds_between(since, now) >= timeouts.verification_seconds:
        give_up(plan, f"{sentence} It was tried for {timeouts.verification_seconds:g} s; {BY_HAND}")
        return
    plan.conditions.verified("Unknown", VerificationReason.PENDING, f"{sentence} It is tried again and again.")
    plan.look_again(again_at)


def give_up(plan: Plan, sentence: str) -> None:
    """Enter into the plan that nothing can be told of the adapter, for ever."""
    plan.conditions.verified("Unknown", VerificationReason.FAILED, sentence)


def _conclude(plan: Plan, words: VerificationMessage) -> None:
    if words.verified is None:
        give_up(plan, f"It could not be told whether the adapter is as it was trained: {words.message}")
    elif words.verified:
        sentence = words.message or "The adapter answers as it was trained."
        plan.conditions.verified("True", VerificationReason.AS_TRAINED, sentence)
    else:
        sentence = words.message or "The adapter does not answer as it was trained."
        plan.conditions.verified("False", VerificationReason.NOT_AS_TRAINED, sentence)


def _words(found: VerificationView) -> VerificationMessage | None:
    """The verdict of the newest pod that has one: its last words and its exit code, which have to say the same."""
    for pod in reversed(found.pods):
        words = VerificationMessage.parse(pod.ended_message)
        if words is None or words.exit_code != pod.exit_code:
            continue
        if words.verified is not None or not (pod.disruption or pod.deleting):
            return words
    return None


def _failure(found: VerificationView, status: FineTuneJobStatus) -> str:
    """Why the Job ended without a verdict."""
    pod = next((pod for pod in reversed(found.pods) if pod.ended), None)
    if found.end_reason == "DeadlineExceeded":
        before = condition(status, ConditionType.VERIFIED)
        last = before.message if before is not None else "nothing."
        return f"The verification did not end in time; what was known of it last: {last}"
    if pod is None:
        how = quoted(found.end_message or found.end_reason).rstrip(".") or "its pod was deleted"
        return f"The Job {found.name} ended without a result ({how}); {BY_HAND}"
    if pod.init_container is not None or pod.ended_reason in NEVER_STARTED:
        return f"{never_started('The verification', pod)} {BY_HAND}"
    if pod.disk_limit is not None:
        return disk_full("The verification", pod.disk_limit, ELSEWHERE)
    if pod.ended_reason == OOM_KILLED:
        return out_of_memory("The verification", pod, ELSEWHERE)
    code = f"with exit code {pod.exit_code}" if pod.exit_code is not None else f"({quoted(pod.ended_message)})"
    return (
        f"The verification ended {code} and did not say why: read the last lines of `kubectl logs {pod.name}`, and "
        "check that workers.image is a trainer of this operator."
    )


def _note_progress(plan: Plan, found: VerificationView, now: datetime, timeouts: Timeouts) -> None:
    # By the clock of another machine. It cannot have begun before success was written down, and that was by our own.
    succeeded_at = min(moment(plan.status.completion_time) or now, now)
    began_at = believed(found.started_at or found.created_at, earliest=succeeded_at, now=now, otherwise=succeeded_at)
    sentence, again_at = _doing(found, began_at, now, timeouts)
    if found.started_at is not None and not found.suspended:
        over = after(began_at, timeouts.verification_seconds)
        before = condition(plan.status, ConditionType.VERIFIED)
        if now >= over and before is not None:
            # Its pod is taken away now; what that waited for is the cause.
            sentence = before.message
        pause = pause_seconds(over, now, least=LOOK_AGAIN_SECONDS) if now > over else LOOK_AGAIN_SECONDS
        plan.look_again(after(max(over, now), pause))
    plan.conditions.verified("Unknown", VerificationReason.VERIFYING, sentence)
    plan.look_again(again_at)


def _doing(
    found: VerificationView, began_at: datetime, now: datetime, timeouts: Timeouts
) -> tuple[str, datetime | None]:
    """What the Job does or waits for, and when to look at that again."""
    unseen = after(now, pause_seconds(began_at, now, least=UNSEEN_SECONDS))
    if found.suspended:
        if found.queue:
            return f"The Job {found.name} waits in the queue {found.queue} until Kueue admits it.", unseen
        return f"The Job {found.name} was suspended by somebody else: set its spec.suspend to false.", unseen
    pod = found.pods[-1] if found.pods else None
    running = f"The Job {found.name} opens the adapter in a process of its own."
    if pod is None:
        expected = after(began_at, timeouts.pods_expected_seconds)
        if now < expected:
            return running, expected
        return f"The Job {found.name} has no pod yet: `kubectl describe job {found.name}` says why.", unseen
    if pod.ended:
        # By the clock of a node. It cannot have ended before the Job began.
        ended_at = believed(pod.ended_at, earliest=began_at, now=now, otherwise=began_at)
        return running, after(now, pause_seconds(ended_at, now, least=LOOK_AGAIN_SECONDS))
    if pod.unschedulable is not None:
        return f"No machine can take the pod of the Job {found.name} at present: {quoted(pod.unschedulable)}", None
    if pod.waiting in STUCK:
        why = f"{pod.waiting}: {quoted(pod.waiting_message)}"
        return f"The container of the Job {found.name} cannot be started ({why}).", None
    return running, None
