"""ttlSecondsAfterFinished: when a finished FineTuneJob is deleted. The adapter stays."""

from __future__ import annotations

from datetime import datetime

from finetune_api.status import FineTuneJobStatus
from finetune_operator.policy.times import after, moment


def expiry(status: FineTuneJobStatus, ttl_seconds: int | None) -> datetime | None:
    """When the finished job is to be deleted; None when it is kept or has not ended."""
    completed = moment(status.completion_time)
    if ttl_seconds is None or completed is None:
        return None
    return after(completed, ttl_seconds)
