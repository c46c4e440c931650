"""The conditions of a job, by the conventions of Kubernetes and kstatus.

Succeeded is always there: Unknown until the job has ended, then True or False for ever. Reconciling and Stalled exist
only while they are true. Verified comes with success, where it was asked for, and changes none of them: the adapter is
there. lastTransitionTime moves when a status does, and at no other time.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from finetune_api.status import Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_operator.policy.times import rfc3339

MESSAGE_LIMIT = 4096

State = Literal["True", "False", "Unknown"]

_ORDER = tuple(ConditionType)


def condition(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    """The condition of that type."""
    return next((item for item in status.conditions if item.type == kind), None)


def is_finished(status: FineTuneJobStatus) -> bool:
    """Whether the job has ended, for ever."""
    succeeded = condition(status, ConditionType.SUCCEEDED)
    return succeeded is not None and succeeded.status != "Unknown"


def progressing(
    status: FineTuneJobStatus, phase: Phase, reason: str, message: str, *, now: datetime, generation: int
) -> None:
    """The job is on its way, or waits for something that may come by itself."""
    status.phase = phase
    _set(status, ConditionType.SUCCEEDED, "Unknown", reason, message, now, generation)
    _set(status, ConditionType.RECONCILING, "True", reason, message, now, generation)
    _drop(status, ConditionType.STALLED)


def at_rest(
    status: FineTuneJobStatus, phase: Phase, reason: str, message: str, *, now: datetime, generation: int
) -> None:
    """The job is as it was asked to be, and has not ended: suspended."""
    status.phase = phase
    _set(status, ConditionType.SUCCEEDED, "Unknown", reason, message, now, generation)
    _drop(status, ConditionType.RECONCILING)
    _drop(status, ConditionType.STALLED)


def stalled(
    status: FineTuneJobStatus, phase: Phase, reason: str, message: str, *, now: datetime, generation: int
) -> None:
    """The job cannot go on until somebody changes it."""
    status.phase = phase
    _set(status, ConditionType.SUCCEEDED, "Unknown", reason, message, now, generation)
    _set(status, ConditionType.STALLED, "True", reason, message, now, generation)
    _drop(status, ConditionType.RECONCILING)


def finished(
    status: FineTuneJobStatus, *, succeeded: bool, reason: str, message: str, now: datetime, generation: int
) -> None:
    """The job has ended. A failed one is Stalled too, or kstatus would call it current."""
    status.phase = Phase.SUCCEEDED if succeeded else Phase.FAILED
    status.completion_time = rfc3339(now)
    _set(status, ConditionType.SUCCEEDED, "True" if succeeded else "False", reason, message, now, generation)
    _drop(status, ConditionType.RECONCILING)
    if succeeded:
        _drop(status, ConditionType.STALLED)
    else:
        _set(status, ConditionType.STALLED, "True", reason, message, now, generation)


def verified(
    status: FineTuneJobStatus, state: State, reason: str, message: str, *, now: datetime, generation: int
) -> None:
    """What is known of the adapter's verification."""
    _set(status, ConditionType.VERIFIED, state, reason, message, now, generation)


def _set(
    status: FineTuneJobStatus,
    kind: ConditionType,
    state: State,
    reason: str,
    message: str,
    now: datetime,
    generation: int,
) -> None:
    old = condition(status, kind)
    changed = Condition(
        type=kind,
        status=state,
        reason=reason,
        message=message[:MESSAGE_LIMIT],
        last_transition_time=old.last_transition_time if old and old.status == state else rfc3339(now),
        observed_generation=generation,
    )
    others = [item for item in status.conditions if item.type != kind]
    # Always in one order, so that the same conditions are the same text.
    status.conditions = sorted([*others, changed], key=_place)


def _place(item: Condition) -> int:
    return _ORDER.index(item.type) if item.type in _ORDER else len(_ORDER)


def _drop(status: FineTuneJobStatus, kind: ConditionType) -> None:
    if condition(status, kind) is not None:
        status.conditions = [item for item in status.conditions if item.type != kind]
