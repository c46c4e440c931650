"""Makes a row's text fit to be judged by eye: whitespace gets a mark, what is invisible its code point.

A prompt format goes wrong by a space or a newline, so these must not look like nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

ROW_CHARACTERS = 3000
"""About how much of a row is shown; the report says what it left out."""


@dataclass(frozen=True)
class Span:
    """A stretch of a row of which `left_out` characters between `head` and `tail` are not shown."""

    head: str
    left_out: int
    tail: str
    trained: bool


def elided(spans: Sequence[tuple[str, bool]]) -> list[Span]:
    """Every span with its beginning and end: a long prompt must not push the trained part off the page."""
    half = max(100, ROW_CHARACTERS // max(1, len(spans)) // 2)
    return [
        Span(text, 0, "", trained)
        if len(text) <= 2 * half
        else Span(text[:half], len(text) - 2 * half, text[-half:], trained)
        for text, trained in spans
    ]


_PIECES = re.compile(r"(\n|\t|\r| {2,}|^ | $| (?=\n)|(?<=\n) )")
_JOINERS = "\u200c\u200d"


def pieces(text: str) -> list[tuple[str, str]]:
    """`text` cut into (kind, piece) so that whitespace and what is invisible can be marked.

    Kinds: `text`, `newline`, `tab`, `return`, `space` (only where it is easily overlooked: at an edge or in a run) and
    `code`, the code point of a character that has no picture, or that could reorder the line around it.
    """
    kinds = {"\n": "newline", "\t": "tab", "\r": "return"}
    found: list[tuple[str, str]] = []
    for piece in _PIECES.split(text):
        if piece in kinds:
            found.append((kinds[piece], piece))
        elif piece and not piece.strip(" "):
            found.append(("space", piece))
        elif piece:
            found += _printable(piece)
    return found


def _printable(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    plain = ""
    for character in text:
        # Cc control, Cf format (direction overrides, zero width), Cs lone surrogates; joiners are part of words.
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _JOINERS:
            found += [("text", plain)] if plain else []
            found.append(("code", f"U+{ord(character):04X}"))
            plain = ""
        else:
            plain += character
    return found + ([("text", plain)] if plain else [])
