"""What is wrong or noteworthy about a job, as data: the command line prints it, the operator turns it into events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

MOST = 10
"""Of problems, and of notices, about one job: more are no help to anybody, and each becomes an event in a cluster."""

_PATH_LIMIT, _MESSAGE_LIMIT = 256, 1000
"""In characters. Keys and values that are quoted in them may be much longer."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One sentence about one place."""

    path: str
    """Dotted keys from the top of the file, as in `spec.lora_config.r`; empty for the file as a whole."""
    message: str
    """One sentence: what is the matter and what to write instead."""

    def below(self, prefix: str) -> Problem:
        """The same, seen from outside of `prefix`."""
        if not prefix:
            return self
        return replace(self, path=f"{prefix}.{self.path}" if self.path else prefix)

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def first_ones(problems: Sequence[Problem], more: int = 0) -> list[Problem]:
    """The first `MOST` of `problems` in words that can be shown anywhere, and how many there are besides.

    Args:
        problems: in the order in which they matter.
        more: how many there are that are not in `problems`.
    """
    shown = [
        Problem(printable(item.path, _PATH_LIMIT), printable(item.message, _MESSAGE_LIMIT)) for item in problems[:MOST]
    ]
    more += len(problems) - len(shown)
    return [*shown, Problem("", f"and {more} more, which are named once these are gone.")] if more else shown


def printable(text: str, limit: int) -> str:
    """`text` of at most `limit` characters, on one line, with nothing in it that acts on a terminal."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
