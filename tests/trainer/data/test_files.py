"""Files of every kind that people have hold the same rows, and those that cannot be read say what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.outcome import Reason
from finetune_trainer.data.conversation import RowRules
from finetune_trainer.data.files import as_jsonl
from finetune_trainer.data.read import ReadReport, read_rows
from finetune_trainer.errors import JobError

RULES = RowRules(needs_answer=True, strip_whitespace=False)
ROWS = [
    {"messages": [{"role": "user", "content": 'é "x", y\n\tz'}, {"role": "assistant", "content": "1\r\n2"}]},
    {"messages": [{"role": "user", "content": "🙂[{"}, {"role": "assistant", "content": "}]", "weight": 1}]},
]
PAIRS = [{"prompt": "a, b", "completion": 'c "d"'}, {"prompt": "e\nf", "completion": "é"}]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def pretty(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, indent=2) for row in rows).encode()


def table(rows: list[Any], delimiter: str = ",") -> bytes:
    """Conversations as JSON in a cell."""
    text = io.StringIO(newline="")
    cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
    writer = csv.DictWriter(text, list(cells[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue().encode()


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    packed: bytes = out.getvalue().to_pybytes()
    return packed


def parquet(rows: list[Any]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


KINDS: dict[str, Callable[[list[Any]], bytes]] = {
    "train.jsonl": jsonl,
    "train": lambda rows: b"\xef\xbb\xbf" + jsonl(rows),
    "train.json": lambda rows: json.dumps(rows).encode(),
    "list.json": lambda rows: b" \n" + json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "pretty.json": pretty,
    "train.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "train.jsonl.bz2": lambda rows: bz2.compress(jsonl(rows)),
    "train.jsonl.zst": lambda rows: zstd(jsonl(rows)),
    "train.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "pretty.json.gz": lambda rows: gzip.compress(pretty(rows)),
    "train.csv": table,
    "excel.csv": lambda rows: b"\xef\xbb\xbf" + table(rows),
    "train.tsv": lambda rows: table(rows, "\t"),
    "TRAIN.CSV.GZ": lambda rows: gzip.compress(table(rows)),
    "train.parquet": parquet,
}


def conversations(folder: Path, name: str, data: bytes) -> list[Any]:
    path = folder / "object"
    path.write_bytes(data)
    report = ReadReport()
    found = [
        row.conversation.messages
        for row in read_rows(as_jsonl(path, f"s3://bucket/{name}", folder / "cache"), RULES, report)
    ]
    assert report.invalid_rows == 0, report.shown
    return found


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["conversations", "pairs"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str, rows: list[Any]) -> None:
    (tmp_path / "plain").mkdir()
    wanted = conversations(tmp_path / "plain", "train.jsonl", jsonl(rows))
    assert len(wanted) == 2
    assert conversations(tmp_path, name, KINDS[name](rows)) == wanted


@pytest.mark.parametrize("name", [name for name in KINDS if name != "pretty.json"])
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1)] * 2), min_size=1))
def test_any_text_survives_any_kind_of_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, texts: list[tuple[str, str]]
) -> None:
    rows = [{"prompt": user, "completion": answer} for user, answer in texts]
    found = conversations(tmp_path_factory.mktemp("any"), name, KINDS[name](rows))
    assert [tuple(message.content for message in messages) for messages in found] == texts


def test_jsonl_is_read_where_it_is_and_others_are_written_once(tmp_path: Path) -> None:
    plain, packed = tmp_path / "train.jsonl", tmp_path / "train.jsonl.gz"
    plain.write_bytes(jsonl(ROWS))
    packed.write_bytes(gzip.compress(jsonl(ROWS)))
    cache = tmp_path / "cache"
    assert as_jsonl(plain, "train.jsonl", cache) == plain
    assert not cache.exists()
    written = as_jsonl(packed, "train.jsonl.gz", cache)
    assert written.read_bytes() == jsonl(ROWS)
    before = written.stat().st_mtime_ns
    assert as_jsonl(packed, "train.jsonl.gz", cache) == written
    assert written.stat().st_mtime_ns == before
    assert {path.suffix for path in cache.iterdir()} <= {".jsonl", ".lock"}


def test_lines_that_are_no_json_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n{broken\n" + jsonl(ROWS[:1])))
    report = ReadReport()
    rows = list(read_rows(as_jsonl(path, "train.jsonl.gz", tmp_path / "cache"), RULES, report))
    assert [row.line for row in rows] == [3]
    assert report.shown[0].startswith("line 2: is not JSON")


def test_what_a_table_lacks_is_no_key_of_the_row(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(parquet(ROWS))
    report = ReadReport()
    list(read_rows(as_jsonl(path, "train.parquet", tmp_path / "cache"), RULES, report))
    assert not report.unused_keys


REFUSED = {
    "train.zip": (b"PK\x03\x04rest", "is a ZIP archive: unpack it (`unzip`), and name the file in it."),
    "train.xz": (b"\xfd7zXZ\x00", "is compressed with xz: unpack it"),
    "utf16.jsonl": ("{}".encode("utf-16"), "is in UTF-16: convert it (`iconv -f UTF-16 -t UTF-8`)."),
    "train.arrow": (b"ARROW1\x00\x00", "is an Arrow file: write it as Parquet or JSONL."),
    "cut.jsonl.gz": (gzip.compress(jsonl(ROWS) * 50)[:60], "cannot be read ("),
    "cut.jsonl.zst": (b"\x28\xb5\x2f\xfd\x00", "cannot be read ("),
    "cut.json": (b'[{"prompt": "a"', "cannot be read ("),
    "cut.parquet": (parquet(ROWS)[:200], "cannot be read ("),
    "twice.gz": (
        gzip.compress(gzip.compress(jsonl(ROWS))),
        "cannot be read (it is compressed, and what is in it is no",
    ),
    "uneven.csv": (b"prompt,completion\na,b,c\n", "cannot be read (a row of 3 fields does not fit the header)"),
    "short.csv": (b"prompt,completion\na\n", "cannot be read (a row of 2 fields does not fit the header)"),
    "latin.csv": ("prompt,completion\né,b\n".encode("latin-1"), "cannot be read ('utf-8' codec can't decode"),
}


@pytest.mark.parametrize(("name", "data", "sentence"), [(name, *rest) for name, rest in REFUSED.items()], ids=REFUSED)
def test_what_cannot_be_read_says_what_to_do(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    path = tmp_path / "object"
    path.write_bytes(data)
    with pytest.raises(JobError) as caught:
        as_jsonl(path, name, tmp_path / "cache")
    assert caught.value.reason is Reason.DATA_INVALID
    assert str(caught.value).startswith(f"{name} {sentence}")
    left = list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else []
    assert all(found.suffix == ".lock" for found in left), "no half file is left"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        as_jsonl(tmp_path / "gone", "gone", tmp_path / "cache")
    assert caught.value.reason is Reason.STORAGE_NOT_FOUND
