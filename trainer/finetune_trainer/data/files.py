"""A data file as people have it -> JSONL, which everything behind this reads.

Compressed files, JSON lists, objects over several lines, CSV and Parquet are written out once, row by row, into the
cache; JSONL is read where it is. What a file is, its first bytes say, and for CSV its name, since it has no mark of its
own. What cannot be read is answered with the command that converts it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import orjson
from filelock import FileLock

from finetune_api.outcome import Reason
from finetune_trainer.data.json_elements import json_elements
from finetune_trainer.data.read import file_sha256, readable
from finetune_trainer.errors import JobError
from finetune_trainer.storage.errors import local_errors

_VERSION = 1
"""Of what is written; another makes files anew."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
"""First bytes -> pyarrow's name."""

_PARQUET = b"PAR1"
_FOREIGN = {
    b"\xff\xff\xff\xff": "is an Arrow file: write it as Parquet, with `to_parquet` of datasets or pandas.",
    b"ARROW1": "is an Arrow file: write it as Parquet, with `to_parquet` of datasets or pandas.",
    b"PK\x03\x04": "is a ZIP archive: unpack it (`unzip`), and name the file in it.",
    b"\xfd7zXZ": "is compressed with xz: unpack it (`xz --decompress`), or compress it with gzip or zstd.",
    b"\xff\xfe": "is in UTF-16: convert it (`iconv -f UTF-16 -t UTF-8`).",
    b"\xfe\xff": "is in UTF-16: convert it (`iconv -f UTF-16 -t UTF-8`).",
}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_HEAD_BYTES = 1 << 16
_LARGEST_FIELD = 1 << 27
"""Characters of a CSV field; Python's own limit is less than a long document."""

_UTF8_BOM = b"\xef\xbb\xbf"


def as_jsonl(path: Path, name: str, cache: Path) -> Path:
    """`path` itself where it is JSONL, else a copy in `cache` that is; line N of that is row N.

    Args:
        path: a file on this machine.
        name: the address the user wrote, for messages, and for its ending.
        cache: folder that holds what is written.

    Raises:
        JobError: DataInvalid, the file is of a kind that is not read, or damaged; StorageNotFound, it cannot be read.
    """
    with readable(path) as file:
        head = file.read(_HEAD_BYTES)
    if not _needs_writing(head, name):
        return path
    digest = hashlib.sha256(f"{_VERSION} {_ending(name)} {file_sha256(path)}".encode()).hexdigest()[:32]
    target = cache / f"{digest}.jsonl"
    with local_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        # Processes of a node want the same file at the same time.
        with FileLock(f"{target}.lock"):
            if not target.exists():
                _write(path, name, target)
    return target


def _needs_writing(head: bytes, name: str) -> bool:
    for mark, sentence in _FOREIGN.items():
        if head.startswith(mark):
            raise JobError(Reason.DATA_INVALID, f"{name} {sentence}")
    if head.startswith((*_COMPRESSED, _PARQUET)) or _ending(name) in _DELIMITERS:
        return True
    return _is_list(head) or _goes_on(head)


def _is_list(head: bytes) -> bool:
    return head.removeprefix(_UTF8_BOM).lstrip().startswith(b"[")


def _goes_on(head: bytes) -> bool:
    """Whether the first object goes on in the next line."""
    first, line_break, _ = head.removeprefix(_UTF8_BOM).lstrip().partition(b"\n")
    if not line_break or not first.startswith(b"{"):
        return False
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError as error:
        return "unexpected end of data" in error.msg
    return False


def _write(path: Path, name: str, target: Path) -> None:
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            for row in _rows(path, name):
                out.write(orjson.dumps(row, default=_not_text, option=orjson.OPT_APPEND_NEWLINE))
        partial.replace(target)
    except (ValueError, TypeError, ArithmeticError, LookupError, OSError, EOFError, csv.Error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The disk's, not the file's.
        raise JobError(
            Reason.DATA_INVALID, f"{name} cannot be read ({_first_line(error)}): is it whole, and what its name says?"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _not_text(value: object) -> object:
    """What JSON has no form for: text as bytes, numbers; pictures and sounds are no text, and refused as that."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return {"not a text": type(value).__name__}


def _rows(path: Path, name: str) -> Iterator[Any]:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        if head.startswith(_PARQUET):
            yield from _parquet(path)
            return
        kind = next((kind for mark, kind in _COMPRESSED.items() if head.startswith(mark)), None)
        if kind is None:
            yield from _text(file, head, name)
            return
    with _unpacked(path, kind) as unpacked:
        inner = unpacked.read(_HEAD_BYTES)
    if inner.startswith((*_COMPRESSED, _PARQUET, *_FOREIGN)):
        raise ValueError("it is compressed, and what is in it is no text")
    with _unpacked(path, kind) as unpacked:
        yield from _text(unpacked, inner, name)


def _unpacked(path: Path, kind: str) -> IO[bytes]:
    import pyarrow as pa  # type: ignore[import-untyped]

    return io.BufferedReader(pa.input_stream(str(path), compression=kind))


def _text(file: IO[bytes], head: bytes, name: str) -> Iterator[Any]:
    if (delimiter := _DELIMITERS.get(_ending(name))) is not None:
        yield from _csv(file, delimiter)
        return
    if head.startswith(_UTF8_BOM):
        file.read(len(_UTF8_BOM))
    if _is_list(head) or _goes_on(head):
        yield from map(orjson.Fragment, json_elements(file, listed=_is_list(head)))
    else:
        yield from _lines(file)


def _lines(file: IO[bytes]) -> Iterator[Any]:
    """Lines as they are: whether one is JSON is said where rows are read, with its number."""
    for line in file:
        yield orjson.Fragment(line.rstrip(b"\r\n"))


def _csv(file: IO[bytes], delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LARGEST_FIELD)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        _check_names(rows.fieldnames or ())
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"a row of {len(row)} fields does not fit the header")
            yield {key: _cell(key, value) for key, value in row.items()}
    finally:
        text.detach()


def _cell(key: str, value: str) -> Any:
    """Conversations stand in a cell as JSON."""
    if key in ("messages", "conversations", "tools") and value.lstrip().startswith("["):
        with suppress(orjson.JSONDecodeError):
            return orjson.loads(value)
    return value


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256):
                yield from map(_without_nulls, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(_first_line(error)) from error


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"it has two columns {twice[:60]!r}")


def _without_nulls(value: Any) -> Any:
    """A column of objects has the keys of all of them: null where one lacks it."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _ending(name: str) -> str:
    """`.csv` of `data.csv` and of `data.csv.gz`."""
    lower = name.lower()
    for packed in (".gz", ".zst", ".bz2"):
        lower = lower.removesuffix(packed)
    return next((ending for ending in _DELIMITERS if lower.endswith(ending)), "")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
