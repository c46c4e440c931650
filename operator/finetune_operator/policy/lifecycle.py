"""Where a job is in its life, told from its status and spec alone."""

from __future__ import annotations

from datetime import datetime

from finetune_api.status import FineTuneJobStatus
from finetune_operator.policy import advance, deadline, retry
from finetune_operator.policy.plan import DesiredState


def attempt_is_open(status: FineTuneJobStatus) -> bool:
    """Whether the current attempt was created and has not ended, as far as status knows."""
    return status.attempt is not None and status.attempt > _last_ended(status)


def next_attempt(status: FineTuneJobStatus) -> int:
    """Number of the attempt after the last one that has ended."""
    return _last_ended(status) + 1


def holds_back(desired: DesiredState, status: FineTuneJobStatus, now: datetime) -> bool:
    """Whether no further attempt is made just now, for another reason than that one has to wait for its time.

    Nobody would notice then that one was made, just before the operator was stopped.
    """
    return (
        desired.suspend
        or bool(desired.problems)
        or deadline.exceeded(status, desired.active_deadline_seconds, now)
        or advance.is_stuck(status)
        or retry.exhausted(status.failures, desired.backoff_limit)
    )


def _last_ended(status: FineTuneJobStatus) -> int:
    return status.attempts[-1].number if status.attempts else 0
