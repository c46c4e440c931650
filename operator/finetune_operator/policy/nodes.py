"""Machines that a further attempt had better avoid, because an earlier one ended there in a way that may be theirs.

A wish and no demand: in a cluster with one fitting machine the job still runs on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finetune_api.outcome import Reason
from finetune_api.status import Attempt
from finetune_operator.policy.reasons import OperatorReason

_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")

NODES_AVOIDED = 8
"""Most nodes that are avoided at once: those of the latest attempts."""

SUSPICIOUS_ENDS = (
    OperatorReason.DISRUPTED,
    OperatorReason.TRAINER_CRASHED,
    OperatorReason.TRAINER_NOT_STARTED,
    Reason.INTERNAL_ERROR,
    Reason.OUT_OF_MEMORY,
)
"""Ends that a node can be the cause of: its GPU or driver, its memory, or what it does to pods."""


def nodes_to_avoid(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Nodes that the next attempt should prefer others to, those of the latest attempts first.

    Args:
        attempts: those that have ended, oldest first. What was before the last suspension does not count: its author
            has looked at the job since.
    """
    found = dict.fromkeys(_suspects(attempts))
    return tuple(found)[:NODES_AVOIDED]


def _suspects(attempts: Sequence[Attempt]) -> Iterator[str]:
    for attempt in reversed(attempts):
        if attempt.reason == OperatorReason.SUSPENDED:
            return
        # One that is no name would have the whole next attempt refused.
        if attempt.node and _NAME.fullmatch(attempt.node) and attempt.reason in SUSPICIOUS_ENDS:
            yield attempt.node
