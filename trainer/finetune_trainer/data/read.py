"""A JSONL file, streamed: memory does not grow with its size, and every bad row is counted, not just the first."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.outcome import Reason
from finetune_api.problem import printable
from finetune_trainer.data.conversation import Conversation, RowError, RowRules, parse_row
from finetune_trainer.errors import JobError

SHOWN_ROWS = 10
"""Bad rows that are shown in full; all are counted."""

MOST_KEYS = 100
"""Keys without a meaning that rows are counted for: a file may have one of its own in every row."""

_SENTENCE_LIMIT = 400
"""In characters. What is wrong with a row may be said in a template's words."""

_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass
class ReadReport:
    """What reading a file found, filled while it is read."""

    rows: int = 0
    """Rows seen, bad ones included; blank lines are not rows."""
    invalid_rows: int = 0
    shown: list[str] = field(default_factory=list)
    """The first bad rows: `line N: what is wrong`, without a full stop, to be listed in a sentence."""
    unused_keys: Counter[str] = field(default_factory=Counter)
    """Rows per key that has no meaning here, for the first `MOST_KEYS` keys."""
    shapes: dict[str, int] = field(default_factory=dict)
    """What rows were read as, and the first line of each kind."""
    example: str | None = None
    """How the first row of no known shape would have to look."""

    def refuse(self, line: int, error: Exception) -> None:
        """Count a bad row, and keep its sentence if it is among the first."""
        self.invalid_rows += 1
        if self.example is None and isinstance(error, RowError):
            self.example = error.example
        if len(self.shown) < SHOWN_ROWS:
            self.shown.append(f"line {line}: {printable(str(error).removesuffix('.'), _SENTENCE_LIMIT)}")

    def count_key(self, key: str, rows: int = 1) -> None:
        """Note that `rows` more rows have a key without a meaning."""
        if key in self.unused_keys or len(self.unused_keys) < MOST_KEYS:
            self.unused_keys[key] += rows

    def add(self, other: ReadReport) -> None:
        """Take in what was found in the next part of the file."""
        self.rows += other.rows
        self.invalid_rows += other.invalid_rows
        self.shown += other.shown[: SHOWN_ROWS - len(self.shown)]
        for key, rows in other.unused_keys.items():
            self.count_key(key, rows)
        for shape, line in other.shapes.items():
            self.shapes.setdefault(shape, line)
        self.example = self.example or other.example

    @property
    def invalid_share(self) -> float:
        """Bad rows among all rows, 0 for an empty file."""
        return self.invalid_rows / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One good row."""

    line: int
    """Line number in the file, from 1."""
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of a file, one after the other."""

    offset: int
    """Bytes before it."""
    size: int
    """Its bytes."""
    first_line: int
    """Line number of its first line, from 1."""
    line_count: int


def blocks(path: Path, size: int) -> Iterator[Block]:
    """All of `path` in order, each block as many lines as begin in `size` bytes, at least one."""
    with path.open("rb") as file:
        offset, line = 0, 1
        while data := file.read(size):
            data += file.readline()
            count = data.count(b"\n") + (not data.endswith(b"\n"))
            yield Block(offset, len(data), line, count)
            offset, line = offset + len(data), line + count


def read_block(path: Path, block: Block, rules: RowRules, report: ReadReport) -> Iterator[Row]:
    """As `read_rows`, of the lines of `block`, which are held in memory."""
    with path.open("rb") as file:
        file.seek(block.offset)
        data = file.read(block.size)
    return _rows(io.BytesIO(data), block.first_line, rules, report)


def read_rows(path: Path, rules: RowRules, report: ReadReport) -> Iterator[Row]:
    """The good rows of `path` in order; bad ones are noted in `report`.

    Args:
        path: the JSONL file, UTF-8.
        rules: what a row must have.
        report: filled while the rows are consumed.
    """
    with path.open("rb") as file:
        yield from _rows(file, 1, rules, report)


def _rows(lines: Iterable[bytes], first_line: int, rules: RowRules, report: ReadReport) -> Iterator[Row]:
    for number, line in enumerate(lines, first_line):
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
        if not line.strip():
            continue
        report.rows += 1
        try:
            conversation = parse_row(line, rules)
        except RowError as error:
            report.refuse(number, error)
            continue
        for key in conversation.unused_keys:
            report.count_key(key)
        report.shapes.setdefault(conversation.shape, number)
        yield Row(number, conversation)


def check_report(path: str, report: ReadReport, allowed_share: float) -> None:
    """Refuse a file with too many bad rows, or with none at all.

    Raises:
        JobError: DataInvalid, with the count, the first bad rows and what to do.
    """
    if report.rows == 0:
        raise JobError(Reason.DATA_INVALID, f"{path} has no rows: write one JSON object per line.")
    if len(report.shapes) > 1:
        kinds = "; ".join(f"line {line}: {shape}" for shape, line in list(report.shapes.items())[:SHOWN_ROWS])
        raise JobError(Reason.DATA_INVALID, f"{path} has rows of several kinds ({kinds}): write all of them as one.")
    if report.invalid_share > allowed_share or report.invalid_rows == report.rows:
        shown = "; ".join(report.shown)
        more = report.invalid_rows - len(report.shown)
        tail = f" (and {more} more)" if more else ""
        raise JobError(
            Reason.DATA_INVALID,
            f"{path}: {report.invalid_rows} of {report.rows} rows are invalid ({report.invalid_share:.2%}, allowed "
            f"{allowed_share:.2%}): {shown}{tail}. {_cure(report)}",
        )


def _cure(report: ReadReport) -> str:
    example = f"A row looks like {printable(report.example, _SENTENCE_LIMIT)}. " if report.example else ""
    if report.invalid_rows == report.rows:
        return f"{example}No row is left to train on: mend them."
    return f"{example}Mend them or raise max_invalid_row_share."


def file_sha256(path: Path) -> str:
    """Hex digest of the file's bytes, read in pieces.

    Raises:
        JobError: StorageNotFound, the file cannot be read.
    """
    with readable(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def readable(path: Path) -> Iterator[io.BufferedReader]:
    """The file, opened.

    Raises:
        JobError: StorageNotFound, it cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise JobError(
            Reason.STORAGE_NOT_FOUND, f"{path} cannot be read ({error.strerror}): check the path."
        ) from error


def count_lines(path: Path) -> int:
    """Line ends in the file, for a progress display."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
