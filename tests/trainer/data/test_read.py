"""A data file is streamed, and its bad rows are counted, shown with their lines and judged against what is allowed."""

from __future__ import annotations

import hashlib
import itertools
import json
import tracemalloc
from pathlib import Path
from types import GeneratorType

import pytest

from finetune_api.outcome import Reason
from finetune_trainer.data.conversation import RowRules
from finetune_trainer.data.read import SHOWN_ROWS, ReadReport, check_report, count_lines, file_sha256, read_rows
from finetune_trainer.errors import JobError

RULES = RowRules(needs_answer=True, strip_whitespace=False)
LIMIT_BYTES = 1 << 20
"""Memory that reading may take, whatever the file's size."""


def good(content: str = "u") -> bytes:
    """One good row, without its line end."""
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    return json.dumps({"messages": messages}, ensure_ascii=False).encode()


GOOD = good()
NO_ANSWER = b'{"messages": [{"role": "user", "content": "u"}]}'


def read(path: Path, content: bytes) -> tuple[list[int], ReadReport]:
    """Line numbers of the good rows, and the report."""
    path.write_bytes(content)
    report = ReadReport()
    return [row.line for row in read_rows(path, RULES, report)], report


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


BOM = b"\xef\xbb\xbf"
READ: list[tuple[str, bytes, list[int], list[str]]] = [
    ("nothing", b"", [], []),
    ("one row without a line end", GOOD, [1], []),
    ("line ends", GOOD + b"\n" + GOOD + b"\n", [1, 2], []),
    ("line ends of Windows", GOOD + b"\r\n" + GOOD + b"\r\n", [1, 2], []),
    ("blank lines are no rows and keep the numbers", b"\n" + GOOD + b"\n \t\r\n\n" + GOOD + b"\n\n", [2, 5], []),
    ("a BOM", BOM + GOOD + b"\n" + GOOD, [1, 2], []),
    ("a BOM on a blank line", BOM + b"\n" + GOOD, [2], []),
    ("a BOM further on", GOOD + b"\n" + BOM + GOOD, [1], ["line 2: is not JSON ("]),
    ("a line separator of Unicode ends no line", good("a\u2028b\x0b\x85c") + b"\n" + GOOD, [1, 2], []),
    ("bad rows between good ones", b"\n".join([GOOD, b"x", GOOD, NO_ANSWER, GOOD]), [1, 3, 5], [
        "line 2: is not JSON (",
        "line 4: has no assistant message",
    ]),
    ("a lone surrogate", b'{"messages": [{"role": "user", "content": "\\udc00"}]}', [], ["line 1: is not JSON ("]),
    ("a list in one line", b"[" + GOOD + b"," + GOOD + b"]", [], ["line 1: is a JSON list: write one object per line"]),
    ("a list over lines", b"[\n" + GOOD + b",\n" + GOOD + b"\n]\n", [3], [
        "line 1: is a JSON list: write one object per line",
        "line 2: is not JSON (unexpected content after document",
        "line 4: is not JSON (",
    ]),
    ("an object over lines", b'{\n"messages": []\n}', [], ["line 1: ", "line 2: ", "line 3: "]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "lines", "shown"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_good_rows_are_read_and_bad_ones_named_by_line(
    path: Path, content: bytes, lines: list[int], shown: list[str]
) -> None:
    found, report = read(path, content)
    assert found == lines
    assert (report.rows, report.invalid_rows) == (len(lines) + len(shown), len(shown))
    assert len(report.shown) == len(shown)
    for said, start in zip(report.shown, shown, strict=True):
        assert said.startswith(start)
        assert not said.endswith(".")


def test_a_row_is_the_conversation_of_its_line(path: Path) -> None:
    path.write_bytes(GOOD + b"\n" + good("第二") + b"\n")
    rows = list(read_rows(path, RULES, ReadReport()))
    assert [(row.line, row.conversation.messages[0].content) for row in rows] == [(1, "u"), (2, "第二")]


def test_all_bad_rows_are_counted_and_the_first_ten_shown(path: Path) -> None:
    _, report = read(path, b"\n".join([NO_ANSWER, GOOD] * 25))
    assert (report.rows, report.invalid_rows) == (50, 25)
    assert report.shown == [f"line {line}: has no assistant message" for line in range(1, 2 * SHOWN_ROWS, 2)]
    assert len(report.shown) == 10


def test_keys_without_a_meaning_are_counted_by_row(path: Path) -> None:
    keyed = GOOD[:-1] + b', "id": 1}'
    _, report = read(path, b"\n".join([keyed, GOOD, keyed]))
    assert report.unused_keys == {"id": 2}


# What is allowed


def _report(rows: int, invalid: int) -> ReadReport:
    report = ReadReport(rows=rows)
    for line in range(1, invalid + 1):
        report.refuse(line, ValueError("has no user message."))
    return report


@pytest.mark.parametrize(
    ("rows", "invalid", "allowed_share"),
    [(1, 0, 0.0), (10, 1, 0.1), (10, 1, 1.0), (3, 1, 1 / 3), (1000, 999, 0.999), (2, 1, 1.0)],
)
def test_as_many_bad_rows_as_allowed_pass(rows: int, invalid: int, allowed_share: float) -> None:
    check_report("data.jsonl", _report(rows, invalid), allowed_share)


REFUSED: list[tuple[int, int, float, str]] = [
    (0, 0, 0.0, "data.jsonl has no rows: write one JSON object per line."),
    (0, 0, 1.0, "data.jsonl has no rows: write one JSON object per line."),
    (
        4,
        1,
        0.0,
        (
            "data.jsonl: 1 of 4 rows are invalid (25.00%, allowed 0.00%): line 1: has no user message. Mend them or "
            "raise max_invalid_row_share."
        ),
    ),
    (
        10,
        2,
        0.1,
        (
            "data.jsonl: 2 of 10 rows are invalid (20.00%, allowed 10.00%): line 1: has no user message; line 2: has "
            "no user message. Mend them or raise max_invalid_row_share."
        ),
    ),
    (1, 1, 1.0, "data.jsonl: 1 of 1 rows are invalid (100.00%, allowed 100.00%): line 1: has no user message. No row"),
    (20, 11, 0.5, "line 10: has no user message (and 1 more). Mend them or raise max_invalid_row_share."),
]


@pytest.mark.parametrize(("rows", "invalid", "allowed_share", "part"), REFUSED)
def test_more_bad_rows_than_allowed_or_no_good_one_are_refused(
    rows: int, invalid: int, allowed_share: float, part: str
) -> None:
    with pytest.raises(JobError) as caught:
        check_report("data.jsonl", _report(rows, invalid), allowed_share)
    assert part in caught.value.message
    assert caught.value.reason is Reason.DATA_INVALID


def test_the_share_of_an_empty_file_is_nothing() -> None:
    assert ReadReport().invalid_share == 0.0


# Streaming


def test_rows_are_read_one_at_a_time(path: Path) -> None:
    path.write_bytes((GOOD + b"\n") * 5)
    report = ReadReport()
    rows = read_rows(path, RULES, report)
    assert isinstance(rows, GeneratorType)
    assert report.rows == 0
    for number in range(1, 6):
        assert next(rows).line == number
        assert report.rows == number


def test_memory_does_not_grow_with_the_file(path: Path) -> None:
    pair = good("u" * 1000) + b"\n" + NO_ANSWER + b"\n"
    with path.open("wb") as file:
        for _ in range(10_000):
            file.write(pair)
    assert path.stat().st_size > 10 * LIMIT_BYTES
    report = ReadReport()
    tracemalloc.start()
    try:
        good_rows = sum(1 for _ in read_rows(path, RULES, report))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (good_rows, report.invalid_rows, report.rows) == (10_000, 10_000, 20_000)
    assert peak < LIMIT_BYTES


def test_an_abandoned_reader_leaves_no_open_file(path: Path) -> None:
    path.write_bytes((GOOD + b"\n") * 3)
    rows = read_rows(path, RULES, ReadReport())
    assert [row.line for row in itertools.islice(rows, 2)] == [1, 2]
    # An open file would be a ResourceWarning, and warnings are errors here.
    del rows


@pytest.mark.parametrize(
    ("content", "lines"), [(b"", 0), (b"a", 0), (b"a\nb\n", 2), (b"\n" * 3, 3), (b"x" * (1 << 20) + b"\n" * 5, 5)]
)
def test_line_ends_are_counted(path: Path, content: bytes, lines: int) -> None:
    path.write_bytes(content)
    assert count_lines(path) == lines


def test_a_checksum_covers_every_byte(path: Path) -> None:
    content = b"x" * 3_000_000 + b"y"
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("name", "why"), [("none.jsonl", "No such file or directory"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(JobError) as caught:
        file_sha256(tmp_path / name)
    assert caught.value.message == f"{tmp_path / name} cannot be read ({why}): check the path."
    assert caught.value.reason is Reason.STORAGE_NOT_FOUND
