"""The phase that an attempt is shown in whose pods all run: what its trainer says, or the likeliest while it is silent.

A trainer of ours reports as soon as it lives. One that never does is another's, or cannot reach the operator: it
counts as preparing for a while, and then as running.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.times import after, believed, believed_if_recent, moment

FIRST_REPORT_SECONDS = 300.0
"""How long a trainer that has not reported anything yet counts as preparing, from when its container began."""

TRAINERS_PHASES = (Phase.PREPARING, Phase.RUNNING, Phase.PUBLISHING)
"""Phases that a trainer can be in."""


def shown_phase(
    status: FineTuneJobStatus,
    pods: Sequence[PodView],
    reported: Phase | None,
    *,
    reports_expected: bool,
    now: datetime,
) -> tuple[Phase, datetime | None]:
    """The phase while all pods run, and when it becomes another without any report; None when it does not.

    Args:
        status: of the job, with the time since which it is active.
        pods: those of the attempt.
        reported: the phase in the newest report that is at hand. An operator that has just started has none.
        reports_expected: whether the trainer was told where to report.
        now: the present.
    """
    if reported is not None:
        return reported, None
    began_at = next((pod.started_at for pod in pods if pod.index == 0), None)
    if status.phase in TRAINERS_PHASES and _was_heard(status, began_at):
        return status.phase, None
    # One that was never heard and was taken to run stays so: by another operator's clock it might prepare again.
    if not reports_expected or (status.phase is Phase.RUNNING and status.progress is None):
        return Phase.RUNNING, None
    active_since = moment(status.active_since) or now
    due = after(believed(began_at, earliest=active_since, now=now, otherwise=active_since), FIRST_REPORT_SECONDS)
    return (Phase.PREPARING, due) if now < due else (Phase.RUNNING, None)


def reports_count_since(status: FineTuneJobStatus, pytorch_job: PyTorchJobView | None, now: datetime) -> datetime:
    """From when on a report of the current attempt is of the run that goes on now, and not of one that a queue stopped.

    Args:
        status: of the job.
        pytorch_job: the attempt's PyTorchJob.
        now: the present.

    Returns:
        A time by our own clock: far in the future while nothing runs, far in the past where nothing was ever stopped.
    """
    if pytorch_job is None or pytorch_job.held:
        return datetime.max.replace(tzinfo=UTC)
    if pytorch_job.resumed_at is None:
        return datetime.min.replace(tzinfo=UTC)
    return moment(status.active_since) or believed_if_recent(pytorch_job.resumed_at, now)


def _was_heard(status: FineTuneJobStatus, began_at: datetime | None) -> bool:
    """Whether a report is known that came from the container that runs now. Both times are by the clock of its node."""
    last = moment(status.progress.last_updated) if status.progress is not None else None
    return last is not None and (began_at is None or last >= began_at)
