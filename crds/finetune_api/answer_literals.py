"""What a format writes around an assistant's message is written once, however much of it the message brings along.

A model generates more than the message: the rest of the format's text before it, and its end-of-turn. Servers give a
client all of that up to the stop (" safe " of "[INST] … [/INST] safe </s>"), and the client sends it back as history.
Written around it once more, the next prompt would be a text that nobody trained. Training, preview, the chat template
and chat follow the same rule, so a row whose answer brings such text is trained as a server will see it.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

TAG = re.compile(r"</?[\w|]+>|<\|[^|<>]+\|>|\[/?[A-Z_]+\]")
"""Text that looks as if its author took it for a special token."""

_TAGS_AND_SPACES = re.compile(rf"{TAG.pattern}|\s+")

MOST_BORDERS = 64
"""Of an end-of-turn, at which a stop may begin or end. Each is one more text that an answer may end with."""


@dataclass(frozen=True, slots=True)
class AnswerLiterals:
    """The format's own text around an assistant's message."""

    head: str
    """Before the message, `trailing_assistant` included."""
    tail: str
    """After the message: its end-of-turn."""
    starts: tuple[str, ...]
    """What a generated answer may begin with before the message, longest first."""
    ends: tuple[str, ...]
    """What it may end with behind the message, longest first."""

    def brought_by(self, content: str) -> bool:
        """Whether `content` has some of what the format will write around it."""
        return content.startswith(self.starts) or content.endswith(self.ends)

    def without(self, content: str) -> str:
        """The message in `content`: without what the format will write around it, where it is there already."""
        start = next((start for start in self.starts if content.startswith(start)), "")
        content = content[len(start) :]
        end = next((end for end in self.ends if content.endswith(end)), "")
        return content[: len(content) - len(end)]


def borders(tail: str) -> set[int]:
    """Positions in a format's text after the message at which a stop may begin or end.

    These are the ends of its tags and of the white space between them, or where it has no tags of the white space
    around it.
    """
    if TAG.search(tail):
        return {border for match in _TAGS_AND_SPACES.finditer(tail) for border in match.span()}
    # By a regular expression, white space that is not at the end is looked through once for each of its characters.
    before, after = len(tail) - len(tail.lstrip()), len(tail.rstrip())
    return {*((0, before) if before else ()), *((after, len(tail)) if after < len(tail) else ())}


@functools.lru_cache(maxsize=8)
def answer_literals(head: str, tail: str, trailing: str) -> AnswerLiterals:
    """The literals of a format.

    An answer's beginning is the part of `head` behind `trailing`. Its end is `tail` up to one of its `borders`. Servers
    leave special tokens out of texts, so the beginning is known without its tags, too.

    Args:
        head: the format's text before the message.
        tail: its text after the message.
        trailing: what `head` begins with and a prompt ends with.
    """
    start = head[len(trailing) :]
    return AnswerLiterals(
        head=head,
        tail=tail,
        starts=_longest_first([start, TAG.sub("", start)]),
        ends=_longest_first([tail, *(tail[:border] for border in borders(tail))]),
    )


def _longest_first(texts: list[str]) -> tuple[str, ...]:
    return tuple(sorted({*texts} - {""}, key=lambda text: (-len(text), text)))
