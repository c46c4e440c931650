"""Whether training gets further from one attempt to the next, however the attempts end.

Attempts that the cluster takes away do not count against backoffLimit, or a busy cluster would fail honest jobs. But a
job whose attempts all end before they have saved anything would burn machines for ever. So those that end without
counting are counted here, until training is known to have got further or its author has suspended the job. The count
is kept in status: an operator that is restarted goes on with it.

Kueue's preemption ends no attempt, and counts for nothing.
"""

from __future__ import annotations

from finetune_api.status import LARGEST_NUMBER, Attempt, FineTuneJobStatus, Progress
from finetune_operator.policy.reasons import OperatorReason

MOST_ATTEMPTS_WITHOUT_PROGRESS = 10
"""Attempts in a row that may be taken away without any progress; with the waits between them half an hour at least."""


def note_end(status: FineTuneJobStatus, ended: Attempt) -> None:
    """An attempt has ended; called before its last checkpoint is kept."""
    if ended.reason == OperatorReason.SUSPENDED:
        note_suspension(status)
    elif not ended.counted:
        status.attempts_without_progress = min((status.attempts_without_progress or 0) + 1, LARGEST_NUMBER)


def note_suspension(status: FineTuneJobStatus) -> None:
    """Its author has suspended the job, and has looked at it."""
    status.attempts_without_progress = None


def note_checkpoint(status: FineTuneJobStatus, step: int) -> None:
    """A checkpoint of that step is known; called before it is kept."""
    saved = status.checkpoint.step if status.checkpoint is not None else 0
    if step > max(saved, status.resumed_step or 0):
        status.attempts_without_progress = None


def note_report(status: FineTuneJobStatus, progress: Progress) -> None:
    """A report of the current attempt has come; called before it is kept.

    Its first step is where the attempt went on from. That tells of the checkpoint of a trainer that was killed before
    it could say anything.
    """
    known = status.progress.step if status.progress is not None else None
    if known is not None or progress.step is None:
        return
    if progress.step > (status.resumed_step or 0):
        note_checkpoint(status, progress.step)
        status.resumed_step = progress.step


def is_stuck(status: FineTuneJobStatus) -> bool:
    """Whether no further attempt is to be made, since none gets further."""
    return (status.attempts_without_progress or 0) >= MOST_ATTEMPTS_WITHOUT_PROGRESS


def stuck_sentence(status: FineTuneJobStatus) -> str:
    """What a job says that has failed for that."""
    last = status.attempts[-1] if status.attempts else None
    how = f"; the last one: {last.reason}: {last.message}" if last is not None else "."
    return (
        f"{status.attempts_without_progress} attempts in a row were taken away before training got any further{how} "
        "Save more often with checkpoint_and_evaluation_frequency, or ask for a priority or machines that are not "
        "taken away, in a new FineTuneJob."
    )
