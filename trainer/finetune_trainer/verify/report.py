"""The result of a verification: one sentence for people, everything that was looked at for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from finetune_api.verification import VerificationMessage


class Status(StrEnum):
    """The result of one check."""

    OK = "ok"
    FAULT = "fault"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    message: str
    """A sentence without its full stop."""


@dataclass(frozen=True)
class CaseResult:
    """One golden prompt."""

    number: int
    """Line of golden.jsonl, from 1."""
    prompt: str
    """A PromptLikeness."""
    answer: str
    """A Likeness, to the trained answer."""
    base: str
    """A Likeness, to the base model's answer."""
    expected: str
    found: str | None
    logprob_difference: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """What was found."""

    verified: bool | None
    """None: it could not be told."""
    message: str
    """One line."""
    checks: list[Check] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the reader should know besides, a sentence each."""

    @property
    def exit_code(self) -> int:
        """0 as trained, 1 not as trained, 2 not known."""
        return VerificationMessage(verified=self.verified).exit_code

    def to_json(self) -> dict[str, Any]:
        """For `-o json`."""
        return asdict(self)


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: names and sentences of servers are foreign."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
