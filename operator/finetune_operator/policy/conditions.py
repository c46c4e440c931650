"""The conditions of a job, by the conventions of Kubernetes and kstatus.

Succeeded is always there: Unknown until the job has ended, then True or False for ever. Reconciling and Stalled exist
only while they are true. Verified comes with success, where it was asked for, and changes none of them: the adapter is
there. lastTransitionTime moves when a status does, and at no other time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from finetune_api.status import Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_operator.policy.times import rfc3339

MESSAGE_LIMIT = 4096

State = Literal["True", "False", "Unknown"]

_ORDER = tuple(ConditionType)


def condition(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    """The condition of that type."""
    return next((item for item in status.conditions if item.type == kind), None)


def is_finished(status: FineTuneJobStatus | Mapping[str, Any]) -> bool:
    """Whether the job has ended, for ever. `status` may also be as the API server holds it."""
    return any(kind == ConditionType.SUCCEEDED and state in ("True", "False") for kind, state in _states(status))


def _states(status: FineTuneJobStatus | Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Type and status of each condition."""
    if isinstance(status, FineTuneJobStatus):
        yield from ((item.type, item.status) for item in status.conditions)
        return
    conditions = status.get("conditions")
    for item in conditions if isinstance(conditions, list) else ():
        if isinstance(item, Mapping):
            yield item.get("type"), item.get("status")


@dataclass(frozen=True)
class ConditionWriter:
    """Writes phase and conditions into the status of one job, as of one time."""

    status: FineTuneJobStatus
    now: datetime
    generation: int
    """metadata.generation of the spec that the conditions are about."""

    def progressing(self, phase: Phase, reason: str, message: str) -> None:
        """The job is on its way, or waits for something that may come by itself."""
        self.status.phase = phase
        self._set(ConditionType.SUCCEEDED, "Unknown", reason, message)
        self._set(ConditionType.RECONCILING, "True", reason, message)
        self._drop(ConditionType.STALLED)

    def at_rest(self, phase: Phase, reason: str, message: str) -> None:
        """The job is as it was asked to be, and has not ended: suspended."""
        self.status.phase = phase
        self._set(ConditionType.SUCCEEDED, "Unknown", reason, message)
        self._drop(ConditionType.RECONCILING)
        self._drop(ConditionType.STALLED)

    def stalled(self, phase: Phase, reason: str, message: str) -> None:
        """The job cannot go on until somebody changes it."""
        self.status.phase = phase
        self._set(ConditionType.SUCCEEDED, "Unknown", reason, message)
        self._set(ConditionType.STALLED, "True", reason, message)
        self._drop(ConditionType.RECONCILING)

    def succeeded(self, reason: str, message: str) -> None:
        """The job has ended with an adapter."""
        self._finished(Phase.SUCCEEDED, "True", reason, message)
        self._drop(ConditionType.STALLED)

    def failed(self, reason: str, message: str) -> None:
        """The job has ended without one. It is Stalled too, or kstatus would call it current."""
        self._finished(Phase.FAILED, "False", reason, message)
        self._set(ConditionType.STALLED, "True", reason, message)

    def verified(self, state: State, reason: str, message: str) -> None:
        """What is known of the adapter's verification."""
        self._set(ConditionType.VERIFIED, state, reason, message)

    def _finished(self, phase: Phase, state: State, reason: str, message: str) -> None:
        self.status.phase = phase
        self.status.completion_time = rfc3339(self.now)
        self._set(ConditionType.SUCCEEDED, state, reason, message)
        self._drop(ConditionType.RECONCILING)

    def _set(self, kind: ConditionType, state: State, reason: str, message: str) -> None:
        old = condition(self.status, kind)
        changed = Condition(
            type=kind,
            status=state,
            reason=reason,
            message=message[:MESSAGE_LIMIT],
            last_transition_time=old.last_transition_time if old and old.status == state else rfc3339(self.now),
            observed_generation=self.generation,
        )
        others = [item for item in self.status.conditions if item.type != kind]
        # Always in one order, so that the same conditions are the same text.
        self.status.conditions = sorted([*others, changed], key=_place)

    def _drop(self, kind: ConditionType) -> None:
        if condition(self.status, kind) is not None:
            self.status.conditions = [item for item in self.status.conditions if item.type != kind]


def _place(item: Condition) -> int:
    return _ORDER.index(item.type) if item.type in _ORDER else len(_ORDER)
