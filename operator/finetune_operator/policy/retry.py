"""Whether and when another attempt is made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune_api.status import Attempt
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.times import after, moment

_MOST_DOUBLINGS = 30


def exhausted(failures: int | None, backoff_limit: int) -> bool:
    """Whether so many counted failures, None for none yet, leave no further attempt."""
    return (failures or 0) > backoff_limit


def delay_seconds(attempts: Sequence[Attempt], *, base_seconds: float, limit_seconds: float) -> float:
    """Wait before the next attempt: doubles with each attempt since the last suspension, disruptions included.

    Disruptions do not count against backoffLimit, but whatever takes the pods away may do so again at once.
    """
    tail = 0
    for attempt in reversed(attempts):
        if attempt.reason == OperatorReason.SUSPENDED:
            break
        tail += 1
    if tail == 0:
        return 0.0
    return min(limit_seconds, base_seconds * 2.0 ** min(tail - 1, _MOST_DOUBLINGS))


def next_attempt_at(
    attempts: Sequence[Attempt], *, base_seconds: float, limit_seconds: float, now: datetime
) -> datetime | None:
    """The earliest time of the next attempt, at most `limit_seconds` from now; None where there was none before.

    An end that lies in the future was written down by an operator with another clock. Nobody knows how long ago it was,
    so nothing is waited for: to wait from now on would be to wait anew at each look.
    """
    wait = delay_seconds(attempts, base_seconds=base_seconds, limit_seconds=limit_seconds)
    ended = moment(attempts[-1].completion_time) if attempts else None
    return after(ended, wait) if ended is not None and ended <= now else None
