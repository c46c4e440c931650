"""What the operator remembers of each job between two looks: hints that save requests, never a ground for an act.

All of it can be lost at any time; status and the cluster hold the truth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.problem import Problem
from finetune_api.status import Phase
from finetune_operator.policy.observed import PyTorchJobView
from finetune_operator.queue import Key


@dataclass(frozen=True)
class Reading:
    """A spec, read."""

    generation: int
    labels: Mapping[str, str]
    """The job's, which its generation does not count."""
    attempt: int | None
    """The job's current attempt at that time."""
    job: FineTuneJob | None
    problems: Sequence[Problem]
    notices: Sequence[Problem]


@dataclass(slots=True)
class Known:
    """One job."""

    key: Key
    uid: str
    reading: Reading | None = None
    phase: Phase | None = None
    gpus: int = 0
    """GPUs of the current attempt while it runs."""
    attempt: int | None = None
    workers_uid: str = ""
    """uid of the current attempt's PyTorchJob."""
    size: tuple[int, int] | None = None
    """Number of the newest attempt that was read, and of its pods."""
    ending_since: datetime | None = None
    """When it was first seen that the current attempt is ending; None while it is not."""
    made: PyTorchJobView | None = None
    """PyTorchJob that was created and is not written down yet, because others were waiting for theirs."""
    hindered: int = 0
    """Tries in a row that could not create the next attempt."""
    waiting: tuple[str, datetime] | None = None
    """Why it waits, and when that was first seen; None while it does not."""
    verifying: bool = False
    """It has succeeded, and the verdict on its adapter is awaited."""
    settled: bool = False
    """It has ended, and nothing is left to be done but to wait for its TTL."""
    announced_version: str = ""
    """resourceVersion in the newest event about it."""
    written_version: str = ""
    """resourceVersion that our own last status write gave it."""

    def note_wait(self, reason: str | None, now: datetime) -> None:
        """It waits for that reason, or for none. Another reason begins another wait."""
        if reason is None:
            self.waiting = None
        elif self.waiting is None or self.waiting[0] != reason:
            self.waiting = (reason, now)


@dataclass(slots=True)
class Memory:
    """All jobs."""

    _jobs: dict[Key, Known] = field(default_factory=dict)

    def job(self, raw: Mapping[str, Any]) -> Known:
        """What is known of the job in `raw`; nothing of an earlier one with its name."""
        metadata = raw["metadata"]
        key, uid = Key(metadata["namespace"], metadata["name"]), metadata["uid"]
        known = self._jobs.get(key)
        if known is None or known.uid != uid:
            known = self._jobs[key] = Known(key, uid)
        return known

    def find(self, key: Key) -> Known | None:
        """What is known of the job called `key`."""
        return self._jobs.get(key)

    def forget(self, key: Key) -> Known | None:
        """Drop the job; what was known of it."""
        return self._jobs.pop(key, None)

    def known_keys(self) -> Sequence[Key]:
        """All jobs that are known."""
        return list(self._jobs)

    def current_attempt(self, namespace: str, name: str, uid: str) -> tuple[int, str] | None:
        """Number of the job's current attempt and uid of its PyTorchJob; None when it is not known."""
        known = self._jobs.get(Key(namespace, name))
        if known is None or known.uid != uid or known.attempt is None or not known.workers_uid:
            return None
        return known.attempt, known.workers_uid

    def phases(self) -> Mapping[Phase, int]:
        """Number of jobs in each phase."""
        return Counter(known.phase for known in self._jobs.values() if known.phase is not None)

    def longest_waits(self, now: datetime) -> Mapping[str, float]:
        """By what jobs wait for: how long the one has waited that has waited longest (seconds)."""
        since: dict[str, datetime] = {}
        for reason, begun in (known.waiting for known in self._jobs.values() if known.waiting is not None):
            since[reason] = min(begun, since.get(reason, begun))
        return {reason: (now - begun).total_seconds() for reason, begun in since.items()}

    def gpus(self) -> int:
        """GPUs of all attempts that run."""
        return sum(known.gpus for known in self._jobs.values())
