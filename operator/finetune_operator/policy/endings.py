"""Ends, as status records them: of an attempt, and of the job. Pure: status in, the same status changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from finetune_api.status import ATTEMPTS_KEPT, LARGEST_NUMBER, Attempt, FineTuneJobStatus, Progress
from finetune_operator.policy import advance, deadline, retry
from finetune_operator.policy.conditions import ConditionWriter
from finetune_operator.policy.failure_reason import Verdict, newest_checkpoint
from finetune_operator.policy.observed import PodView
from finetune_operator.policy.plan import Timeouts
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.results import adapter_of, keep_checkpoint, keep_results
from finetune_operator.policy.times import rfc3339


def deleted(attempt: int | None, pods: Sequence[PodView]) -> Verdict:
    """The PyTorchJob is gone or going, and it was not us: what its pods said before still counts."""
    words = next((pod.last_words for pod in pods if pod.index == 0 and pod.ended), None)
    adapter = adapter_of(words) if words is not None else None
    if adapter is not None:
        return Verdict(
            succeeded=True,
            reason=OperatorReason.SUCCEEDED,
            message=f"The adapter is at {adapter.uri}.",
            exit_code=0,
            words=words,
        )
    return Verdict(
        succeeded=False,
        reason=OperatorReason.WORKERS_DELETED,
        message=f"The PyTorchJob of attempt {attempt} was deleted by somebody else; this does not count as "
        "a failure. To stop the job, set suspend: true or delete the FineTuneJob.",
        retryable=True,
        counted=False,
        checkpoint=newest_checkpoint(pods),
    )


def suspended() -> Verdict:
    """The author asked for it."""
    return stopped(OperatorReason.SUSPENDED, "The job was suspended.")


def stopped(reason: str, message: str) -> Verdict:
    """The operator ends an attempt that runs; nobody is to blame."""
    return Verdict(succeeded=False, reason=reason, message=message, retryable=True, counted=False)


def final(verdict: Verdict, status: FineTuneJobStatus) -> Verdict:
    """`verdict`, not to be retried where the attempt before ended in the same way and neither is an accident now."""
    before = status.attempts[-1].reason if status.attempts else None
    return replace(verdict, retryable=False) if verdict.doubtful and before == verdict.reason else verdict


def end_attempt(status: FineTuneJobStatus, verdict: Verdict, now: datetime) -> None:
    """The current attempt has ended."""
    deadline.account(status, since=None, now=now)
    ended = Attempt(
        number=status.attempt or 1,
        reason=verdict.reason,
        message=verdict.message[:4096],
        exit_code=verdict.exit_code,
        counted=verdict.counted,
        node=verdict.node,
        start_time=status.attempt_start_time,
        completion_time=rfc3339(now),
    )
    status.attempts = [*status.attempts, ended][-ATTEMPTS_KEPT:]
    advance.note_end(status, ended)
    if verdict.counted and not verdict.succeeded:
        status.failures = min((status.failures or 0) + 1, LARGEST_NUMBER)
    if status.progress is not None:
        status.progress = status.progress.model_copy(update={"eta_seconds": None})
    keep_checkpoint(status, verdict.checkpoint)


def succeed(conditions: ConditionWriter, verdict: Verdict) -> None:
    """The job has ended with an adapter."""
    status = conditions.status
    end_attempt(status, verdict, conditions.now)
    if verdict.words is not None:
        keep_results(status, verdict.words)
    # The last report may have been lost; the end may not.
    progress = status.progress or Progress()
    status.progress = progress.model_copy(update={"percent": 100, "eta_seconds": 0})
    conditions.succeeded(OperatorReason.SUCCEEDED, verdict.message)


def give_up(conditions: ConditionWriter, backoff_limit: int) -> None:
    """No further attempt is allowed."""
    status = conditions.status
    failures = status.failures or 1
    tries = f"{failures} attempts have failed" if failures > 1 else "The attempt has failed"
    # Of many attempts only the newest are kept.
    last = next((attempt for attempt in reversed(status.attempts) if attempt.counted), None)
    how = f"; the last one: {last.reason}: {last.message}" if last is not None else "."
    sentence = f"{tries} and backoffLimit: {backoff_limit} allows no more{how}"
    conditions.failed(OperatorReason.RETRIES_EXHAUSTED, sentence)


def next_attempt_at(status: FineTuneJobStatus, timeouts: Timeouts, now: datetime) -> datetime | None:
    """The earliest time of the next attempt; one that is over, or None, when it may start at once."""
    return retry.next_attempt_at(
        status.attempts, base_seconds=timeouts.retry_base_seconds, limit_seconds=timeouts.retry_limit_seconds, now=now
    )
