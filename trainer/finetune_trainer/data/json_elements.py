"""The elements of a JSON list, or objects one after the other, as texts; nothing of them is parsed.

So each is judged like a line of JSONL, with its own number, and memory holds one of them at a time, however deep.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

_CHUNK_BYTES = 1 << 20
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')
_BETWEEN = b" \t\r\n,"
_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")
"""Within JSON they stand between tokens only."""


def json_elements(file: IO[bytes], *, listed: bool) -> Iterator[bytes]:
    """Each element in one line.

    Args:
        file: JSON in UTF-8, without a byte order mark.
        listed: it is one list; else objects follow each other.

    Raises:
        ValueError: it ends amid an element, or goes on behind the list.
    """
    scanner = _Scanner(level=1 if listed else 0)
    while chunk := file.read(_CHUNK_BYTES):
        yield from scanner.elements(chunk)
    if scanner.depth or scanner.in_string:
        raise ValueError("it ends amid a row")
    if scanner.rest():
        raise ValueError("something stands behind its end")


class _Scanner:
    def __init__(self, level: int) -> None:
        self.depth = 0
        self.in_string = False
        self._level = level
        """Depth of what lies around the elements."""
        self._parts: list[bytes] = []
        """Of the element so far."""
        self._closed = False
        """Whether the list has ended."""
        self._skip = 0
        """Bytes of the next chunk that are escaped."""

    def elements(self, chunk: bytes) -> Iterator[bytes]:
        position, begin = self._skip, 0
        self._skip = 0
        while (found := (_INSIDE if self.in_string else _OUTSIDE).search(chunk, position)) is not None:
            mark, position = found[0], found.end()
            if mark == b"\\":
                position += 1
            elif mark == b'"':
                self.in_string = not self.in_string
            elif mark in b"[{":
                self.depth += 1
                if self.depth == self._level:
                    begin = position  # the list's own bracket
                    if self._closed:
                        raise ValueError("something stands behind its end")
            elif mark in b"]}":
                self.depth -= 1
                ended = self.depth < self._level  # the list's own bracket
                self._closed = self._closed or ended
                if self.depth <= self._level:
                    self._parts.append(chunk[begin : found.start() if ended else position])
                    begin = position
                    yield from self._element()
                if self.depth < 0:
                    raise ValueError("it has more closing brackets than opening ones")
            elif self.depth == self._level:
                self._parts.append(chunk[begin : found.start()])
                begin = position
                yield from self._element()
        self._skip = max(0, position - len(chunk))
        self._parts.append(chunk[begin:])

    def rest(self) -> bytes:
        """What was read since the last element."""
        found = b"".join(self._parts).strip(_BETWEEN)
        self._parts = []
        return found

    def _element(self) -> Iterator[bytes]:
        if text := self.rest():
            yield text.translate(_LINE_BREAKS)
