"""Which of the ranks' ends was the cause, and what the attempt therefore says and returns.

When one rank fails, the others fail in its wake: they lose a connection, or the launcher stops them. Those ends are
collateral; this module finds the one that is not. Pure: ends in, verdict out.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from finetune_api.outcome import FIRST_RETRYABLE_EXIT_CODE, Reason, TerminationMessage
from finetune_trainer.launch.environment import DEFAULT_GRACE_SECONDS
from finetune_trainer.launch.failures import exit_code, host_memory_sentence, stopped_sentence

_EARLY_SECONDS = 2.0
"""Ends without last words have their time to the second, and the first failure is not the first end by some more."""


@dataclass(frozen=True)
class RankEnd:
    """How one rank of this node ended."""

    rank: int
    code: int | None
    """Exit code; negative when a signal ended the process; None when the launcher was stopped and did not learn it."""
    outcome: TerminationMessage | None
    """Its last words, if it had time for any."""
    at: float
    """Seconds since the epoch."""

    @property
    def succeeded(self) -> bool:
        """A rank that said so succeeded, even when its interpreter crashed afterwards while shutting down."""
        return self.outcome is not None and self.outcome.succeeded


@dataclass(frozen=True)
class Verdict:
    """The end of the attempt on this node."""

    message: TerminationMessage
    exit_code: int


class _Weight(IntEnum):
    """How surely an end is the cause rather than its echo; the smallest wins, among equals the earliest."""

    USER = 0
    WORLD = 1
    KILLED = 2
    """By a signal that no peer's failure sends: SIGKILL, SIGSEGV, SIGBUS …"""
    UNEXPLAINED = 3
    """Internal errors rank below KILLED: a peer's death may surface as an error text that nobody recognised."""
    ABORTED = 4
    """SIGABRT: how NCCL's watchdog ends a rank whose peer is gone, but also a failed assertion."""
    ECHO = 5
    LEFT_OVER = 6
    """Ended by the launcher without last words."""


def conclude(
    ends: Sequence[RankEnd],
    *,
    stopped_by: str | None = None,
    oom_kills: int = 0,
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
) -> Verdict:
    """The verdict over all ranks of this node.

    Args:
        ends: at least one, in any order.
        stopped_by: name of the signal that the launcher itself received, if it did.
        oom_kills: processes that the kernel's out-of-memory killer has ended meanwhile.
        grace_seconds: from SIGTERM to SIGKILL, which torch elastic sends to the ranks that survive a failure.
    """
    ends = sorted(ends, key=lambda end: end.rank)
    lead = ends[0]
    # The adapter is published whole once rank 0 says so; what other ranks did afterwards cannot undo it.
    if lead.outcome is not None and lead.succeeded and (lead.rank == 0 or all(end.succeeded for end in ends)):
        return Verdict(lead.outcome, 0)

    failed = [end for end in ends if not end.succeeded]
    late = min(end.at for end in failed) + max(grace_seconds - _EARLY_SECONDS, 1.0)
    cause = min(failed, key=lambda end: (_weight(end, late), end.at, end.rank))
    if stopped_by is not None and _weight(cause, late) is not _Weight.USER:
        message = _stopped(failed)
        code = exit_code(message)
    else:
        message, code = _describe(cause, oom_kills)
    checkpoint = message.checkpoint or next(
        (end.outcome.checkpoint for end in ends if end.outcome and end.outcome.checkpoint), None
    )
    return Verdict(message.model_copy(update={"checkpoint": checkpoint}), code)


def _weight(end: RankEnd, late: float) -> _Weight:
    """How surely it is the cause; a SIGKILL at `late` or after it is torch elastic's."""
    outcome = end.outcome
    if outcome is not None:
        if outcome.collateral or outcome.reason in (Reason.PEER_FAILED, Reason.TERMINATED):
            return _Weight.ECHO
        if outcome.reason in (None, Reason.INTERNAL_ERROR):
            return _Weight.UNEXPLAINED
        return _Weight.USER if exit_code(outcome) < FIRST_RETRYABLE_EXIT_CODE else _Weight.WORLD
    code = end.code
    if code is None or code in (-signal.SIGTERM, -signal.SIGINT):
        return _Weight.LEFT_OVER
    if code == -signal.SIGKILL and end.at >= late:
        return _Weight.LEFT_OVER
    if code == -signal.SIGABRT:
        return _Weight.ABORTED
    return _Weight.KILLED if code < 0 else _Weight.UNEXPLAINED


def _stopped(failed: Sequence[RankEnd]) -> TerminationMessage:
    """Last words after a stop: those of the lowest rank that got to say them, best with a checkpoint."""
    said = [end.outcome for end in failed if end.outcome is not None and end.outcome.reason is Reason.TERMINATED]
    saved = next((outcome for outcome in said if outcome.checkpoint), None)
    if saved is not None or said:
        return saved or said[0]
    return TerminationMessage(
        succeeded=False, reason=Reason.TERMINATED, message=stopped_sentence(checkpoint_saved=False)
    )


def _describe(end: RankEnd, oom_kills: int) -> tuple[TerminationMessage, int]:
    if end.outcome is not None:
        return end.outcome, exit_code(end.outcome)
    reason, sentence, code = _silent_end(end, oom_kills)
    message = TerminationMessage(succeeded=False, reason=reason, message=sentence, rank=end.rank)
    return message, exit_code(message) if code is None else code


def _silent_end(end: RankEnd, oom_kills: int) -> tuple[Reason, str, int | None]:
    """Reason, sentence and exit code (None: the reason's own) of a rank without last words."""
    code = end.code
    if code is None or code >= 0:
        return (
            Reason.INTERNAL_ERROR,
            f"Rank {end.rank} ended with exit code {code} and did not say why; look for its last lines in the log.",
            None,
        )
    name = _signal_name(-code)
    if code == -signal.SIGKILL and oom_kills > 0:
        sentence = host_memory_sentence(f"Rank {end.rank} was ended by the kernel's out-of-memory killer")
        return Reason.OUT_OF_MEMORY, sentence, None
    if code == -signal.SIGKILL:
        # Retryable, for nothing proves the likely cause: the operator knows whether the container was OOMKilled.
        sentence = host_memory_sentence(f"Rank {end.rank} was ended by {name}, most likely for want of memory")
    else:
        sentence = (
            f"Rank {end.rank} was ended by {name} and could not say why; another attempt may succeed. If it comes "
            "back, report it with the last lines of the log."
        )
    return Reason.INTERNAL_ERROR, sentence, 128 - code


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
