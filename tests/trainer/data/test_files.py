"""Files of every kind that people have hold the same rows, and those that cannot be read say what to do."""

from __future__ import annotations

import bz2
import csv
import errno
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
from finetune_trainer.data import files, json_elements
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


def parquet_of(found: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(found, out)
    return out.getvalue()


KINDS: dict[str, Callable[[list[Any]], bytes]] = {
    "train.jsonl": jsonl,
    "train": lambda rows: b"\xef\xbb\xbf" + jsonl(rows),
    "train.json": lambda rows: json.dumps(rows).encode(),
    "list.json": lambda rows: b" \n" + json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "pretty.json": pretty,
    "bom.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode(),
    "half.json": lambda rows: "\r\n".join(json.dumps(row, separators=(",\r\n", ":")) for row in rows).encode(),
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


def test_elements_of_a_list_are_judged_like_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(
        b'[{"prompt": "a", "completion": "b\\ud83d"}, 7, {"prompt": "a", "completion": "b", "id": 1e999}\n,]'
    )
    written = as_jsonl(path, "train.json", tmp_path / "cache")
    assert written.read_bytes().splitlines() == [
        b'{"prompt": "a", "completion": "b\\ud83d"}',
        b"7",
        b'{"prompt": "a", "completion": "b", "id": 1e999}',
    ]
    report = ReadReport()
    list(read_rows(written, RULES, report))
    assert [sentence.partition(":")[0] for sentence in report.shown][:2] == ["line 1", "line 2"]


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.recursive(st.text() | st.integers(), lambda v: st.lists(v) | st.dictionaries(st.text(), v))),
    size=st.integers(1, 7),
)
def test_elements_are_whole_wherever_a_file_is_cut_for_reading(values: list[Any], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_elements, "_CHUNK_BYTES", size)
        for indent in (None, 1):
            file = io.BytesIO(json.dumps(values, indent=indent, ensure_ascii=indent is None).encode())
            found = list(json_elements.json_elements(file, listed=True))
            assert [json.loads(text) for text in found] == values
            assert not any(b"\n" in text for text in found)


def test_what_a_table_holds_that_is_no_text_is_not_trained_as_one(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    cells = {
        "prompt": pa.array([b"a", b"b"], pa.binary()),
        "completion": pa.array([b"\xff\x00", b"ok"], pa.binary()),
    }
    path.write_bytes(parquet_of(pa.table(cells)))
    report = ReadReport()
    (row,) = list(read_rows(as_jsonl(path, "train.parquet", tmp_path / "cache"), RULES, report))
    assert [message.content for message in row.conversation.messages] == ["b", "ok"]
    assert report.shown == ["line 1: message 2 (assistant) has a content that is an object: write it as one string"]


@pytest.mark.parametrize(
    "name", ["hf://datasets/o/n@v1/data/train.csv", "pvc://claim/a.b/train.CSV.gz", "train.tsv.zst"]
)
def test_a_table_is_known_by_its_ending_wherever_it_lies(name: str) -> None:
    assert files._ending(name) in (".csv", ".tsv")


def test_a_disk_that_fails_is_not_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(table(PAIRS))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("orjson.dumps", full)
    with pytest.raises(JobError) as caught:
        as_jsonl(path, "train.csv", tmp_path / "cache")
    assert caught.value.reason is Reason.DISK_FULL


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
    "train.arrow": (b"ARROW1\x00\x00", "is an Arrow file: write it as Parquet, with `to_parquet`"),
    "stream.arrow": (b"\xff\xff\xff\xff\x10", "is an Arrow file: write it as Parquet, with `to_parquet`"),
    "behind.json": (b'[{"prompt": "a"}] {}', "cannot be read (something stands behind its end)"),
    "closed.json": (b"[1]]", "cannot be read (it has more closing brackets than opening ones)"),
    "deep.json": (b"[" * 100_000, "cannot be read (it ends amid a row)"),
    "twice.csv": (b"prompt,completion,completion\na,b,c\n", "cannot be read (it has two columns 'completion')"),
    "date.parquet": (
        parquet_of(pa.table({"prompt": ["a"], "completion": ["b"], "d": pa.array([2**31 - 1], pa.date32())})),
        "cannot be read (",
    ),
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
