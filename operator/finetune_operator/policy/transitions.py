"""Events: one for each change of a job that a person would want to hear of, none for a state that lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune_api.problem import Problem
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase
from finetune_operator.policy.conditions import condition, is_finished
from finetune_operator.policy.reasons import OperatorReason, VerificationReason

QUIET_ENDS = (OperatorReason.SUSPENDED, OperatorReason.DISRUPTED)
"""Ends of attempts that are nobody's fault."""

WAITS = (
    OperatorReason.WAITING_FOR_QUOTA,
    OperatorReason.UNSCHEDULABLE,
    OperatorReason.IMAGE_PULL_FAILED,
    OperatorReason.CONFIGURATION_MISSING,
    OperatorReason.CONTAINER_START_FAILED,
    OperatorReason.PODS_NOT_CREATED,
    OperatorReason.PODS_NOT_STARTED,
    OperatorReason.NAME_TAKEN,
    OperatorReason.TRAINING_OPERATOR_MISSING,
    OperatorReason.TRAINING_OPERATOR_UNAVAILABLE,
    OperatorReason.ADMISSION_UNAVAILABLE,
    OperatorReason.CREATION_FORBIDDEN,
)

MOST_WARNINGS = 10
"""Events about problems, and about notices, that one look posts before it says how many more there are."""


@dataclass(frozen=True)
class Event:
    """A Kubernetes event to be."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def events_between(
    old: FineTuneJobStatus,
    new: FineTuneJobStatus,
    *,
    problems: Sequence[Problem] = (),
    notices: Sequence[Problem] = (),
) -> list[Event]:
    """What happened between two states of a job.

    Args:
        old: status as it was read.
        new: status as it was written.
        problems: what is wrong with the spec; told when the job becomes stalled by them.
        notices: what its author should know; told once for each spec.
    """
    return [*_events(old, new, problems, notices), *_verification_events(old, new)]


def _verification_events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Event]:
    before, after = condition(old, ConditionType.VERIFIED), condition(new, ConditionType.VERIFIED)
    if after is None or after.reason == VerificationReason.PENDING or (before and before.reason == after.reason):
        return
    expected = after.reason in (VerificationReason.VERIFYING, VerificationReason.AS_TRAINED)
    yield Event("Normal" if expected else "Warning", after.reason, after.message)


def _events(
    old: FineTuneJobStatus, new: FineTuneJobStatus, problems: Sequence[Problem], notices: Sequence[Problem]
) -> Iterator[Event]:
    if old.observed_generation != new.observed_generation:
        yield from _warnings("Notice", notices)
    known = {attempt.number for attempt in old.attempts}
    finished = is_finished(new) and not is_finished(old)
    end = condition(new, ConditionType.SUCCEEDED)
    for attempt in new.attempts:
        # The last attempt's end is told below, with what it means for the job.
        if attempt.number not in known and not (finished and end and attempt.reason == end.reason):
            kind: Literal["Normal", "Warning"] = "Normal" if attempt.reason in QUIET_ENDS else "Warning"
            yield Event(
                kind,
                attempt.reason or "AttemptEnded",
                f"Attempt {attempt.number}: {attempt.message or 'it has ended.'}",
            )
    if new.attempt is not None and new.attempt != old.attempt:
        yield Event("Normal", "AttemptCreated", f"Attempt {new.attempt} was created.")
    if end is None:
        return
    if finished:
        yield Event("Normal" if end.status == "True" else "Warning", end.reason, end.message)
        return
    before = condition(old, ConditionType.SUCCEEDED)
    changed = before is None or before.reason != end.reason
    if changed and end.reason in WAITS:
        kind = "Normal" if end.reason == OperatorReason.WAITING_FOR_QUOTA else "Warning"
        yield Event(kind, end.reason, end.message)
    stalled, was_stalled = condition(new, ConditionType.STALLED), condition(old, ConditionType.STALLED)
    if stalled is not None and (was_stalled is None or was_stalled.message != stalled.message):
        if problems:
            yield from _warnings(stalled.reason, problems)
        else:  # the API server may refuse what nobody has found a problem in
            yield Event("Warning", stalled.reason, stalled.message)
    if new.phase == Phase.RUNNING and changed and end.reason == Phase.RUNNING:
        yield Event("Normal", Phase.RUNNING, end.message)


def _warnings(reason: str, problems: Sequence[Problem]) -> Iterator[Event]:
    """One for each of the first few: a spec may be wrong in a hundred thousand places."""
    for problem in problems[:MOST_WARNINGS]:
        yield Event("Warning", reason, str(problem))
    more = len(problems) - MOST_WARNINGS
    if more > 0:
        yield Event("Warning", reason, f"{more} more of this kind: mend the first ones and apply the job again.")
