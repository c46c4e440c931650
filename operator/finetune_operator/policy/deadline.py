"""activeDeadlineSeconds: the time a job may be active over all attempts. Kept in status, so restarts change nothing.

Active is a job whose attempt has been created and is not suspended, by its author or by a queue; waiting between two
attempts does not count either.
"""

from __future__ import annotations

from datetime import datetime

from finetune_api.status import LARGEST_NUMBER, FineTuneJobStatus
from finetune_operator.policy.observed import PyTorchJobView
from finetune_operator.policy.times import CLOCK_TOLERANCE, after, believed, moment, rfc3339, seconds_between


def account(status: FineTuneJobStatus, *, since: datetime | None, now: datetime) -> None:
    """Keep the books: the job became active at `since`, by our own clock, or is not active (None).

    A beginning in the future was written down by an operator whose clock was ahead; it counts from now.
    """
    running_since = moment(status.active_since)
    if since is not None:
        if running_since is None or running_since > now:
            status.active_since = rfc3339(since)
    elif running_since is not None:
        seconds = (status.active_seconds or 0) + round(seconds_between(running_since, now))
        status.active_seconds = min(seconds, LARGEST_NUMBER)
        status.active_since = None


def note_suspension(status: FineTuneJobStatus, pytorch_job: PyTorchJobView, now: datetime) -> None:
    """Count what was active up to when a queue stopped the attempt: maybe long ago, while no operator looked.

    Where it has been let go again since, nobody knows any more how long it was active before, and that does not count.
    What is not clearly later may be the difference of two clocks.
    """
    since = moment(status.active_since)
    if since is None:
        return
    stopped_at, resumed_at = pytorch_job.suspended_at, pytorch_job.resumed_at
    if pytorch_job.held:
        account(status, since=None, now=believed(stopped_at, earliest=since, now=now, otherwise=now))
    elif resumed_at is not None and since + CLOCK_TOLERANCE < resumed_at <= now:
        status.active_since = rfc3339(resumed_at)


def deadline(status: FineTuneJobStatus, limit_seconds: int | None) -> datetime | None:
    """When the deadline comes if the job stays active; None without a limit or while it is not active."""
    since = moment(status.active_since)
    if limit_seconds is None or since is None:
        return None
    return after(since, limit_seconds - (status.active_seconds or 0))


def exceeded(status: FineTuneJobStatus, limit_seconds: int | None, now: datetime) -> bool:
    """Whether the job has been active for longer than it may be."""
    if limit_seconds is None:
        return False
    since = moment(status.active_since)
    running = seconds_between(since, now) if since else 0.0
    return (status.active_seconds or 0) + running >= limit_seconds


def deadline_sentence(limit_seconds: int) -> str:
    """What a job says that was ended by its deadline."""
    return (
        f"The job was active for more than activeDeadlineSeconds: {limit_seconds}; what it has saved stays in the "
        "output. Create a new FineTuneJob, which begins anew, with more time, nodes or GPUs, or fewer epochs."
    )
