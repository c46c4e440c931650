"""Whatever a data file holds, each of its rows is kept, dropped or named with its line, or the file is refused."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.outcome import Reason
from finetune_api.problem import MOST
from finetune_trainer.data.dataset import prepare
from finetune_trainer.data.read import MOST_KEYS
from finetune_trainer.errors import JobError
from tests.hostile.samples import JSON, JUNK, KEYS, as_json, damaged, is_sentence, near_misses, some
from tests.real_tokenizers import smollm2
from tests.trainer.data.test_dataset import source
from tests.trainer.run.tiny_job import CHATML

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1+1?", "name": "x"},
    {"role": "assistant", "content": "2", "weight": 0, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
]
ROW = {"messages": TALK, "images": [], "tools": [{"type": "function"}]}
GOOD = as_json({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]})

MAGIC = (
    b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"PAR1", b"\xff\xfe{\x00", b"\xfe\xff\x00{", b"BZh9", b"\x28\xb5\x2f\xfd",
    b"\xef\xbb\xbf", b"\x00" * 9, b"NaN", b"Infinity", b"-", b'{"messages":NaN}', b'{"a":1e400}', b"1" * 5000,
    b"[" * 5000, b'{"a":' * 5000, b'"\\ud800"', b'{"messages":[],"messages":1}', b"\xed\xa0\x80", b"\r", b"\x0b",
    b"\xc2\x85",
)  # fmt: skip

LINES = st.one_of(
    near_misses(ROW).map(as_json),
    near_misses(ROW).map(lambda row: json.dumps(row).encode()),
    damaged(as_json(ROW)),
    JSON.map(as_json),
    st.builds(lambda message: as_json({"messages": [message, *TALK[1:]]}), JUNK | st.dictionaries(KEYS, JUNK)),
    st.binary(max_size=60),
    st.sampled_from(MAGIC),
    st.builds(bytes.__add__, st.sampled_from(MAGIC), st.just(GOOD)),
)


def checked(content: bytes, *, limit: int | None = None, everything: bool = False) -> set[str]:
    """What became of the file; every row is accounted for, and every sentence is one."""
    rows = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.jsonl")
        path.write_bytes(content)
        shares = {"max_invalid_share": 1.0, "max_dropped_share": 1.0}
        made = source(path, smollm2(), CHATML, context_length=limit, train_all=everything, **shares)
        try:
            data = prepare(made, Path(folder, "cache"))
        except JobError as error:
            return {"refused"} if error.reason is Reason.DATA_INVALID and is_sentence(error, 5000) else {str(error)}
        stats = data.stats
        assert stats.rows == len(rows) == stats.kept_rows + stats.invalid_rows + stats.dropped_rows
        assert len(data) == stats.kept_rows
        for row in range(len(data)):
            assert any(trained.any() for _, trained in data.sequences(row))
        for notice in stats.notices:
            assert notice.endswith(".")
            assert len(notice) < 5000
            assert notice.isprintable()
        named = re.findall(r"line (\d+): [^;]", " ".join(stats.notices))
        assert len(named) >= min(stats.invalid_rows, 10)
        return {"kept"} | ({"invalid"} if stats.invalid_rows else set())


@some(40)
@given(st.lists(LINES, max_size=30), st.booleans(), st.sampled_from([None, 1, 8]), st.booleans())
@example([b"\xef\xbb\xbf", b"\xef\xbb\xbf" + GOOD], False, None, False)
def test_every_row_is_accounted_for(lines: list[bytes], windows: bool, limit: int | None, everything: bool) -> None:
    content = (b"\r\n" if windows else b"\n").join([*lines, GOOD])
    assert checked(content, limit=limit, everything=everything) <= {"refused", "kept", "invalid"}


@pytest.mark.parametrize("prefix", [b"\x1f\x8b\x08", b"PK\x03\x04", b"PAR1"])
def test_a_file_of_another_kind_is_refused(prefix: bytes) -> None:
    assert checked(prefix + bytes(range(256)) * 100) == {"refused"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_encoding_is_refused(encoding: str) -> None:
    assert checked((GOOD.decode() + "\n").encode(encoding)) == {"refused"}


def test_a_row_as_long_as_a_file_is_one_among_others() -> None:
    long = json.dumps({"messages": [{"role": "user", "content": "u " * (1 << 20)}, TALK[2]]}).encode()
    broken = b'{"messages": "' + b"x" * (10 << 20)
    assert checked(b"\n".join([long, broken, GOOD]), limit=64) == {"kept", "invalid"}


def test_keys_of_their_own_in_every_row_are_counted_up_to_a_number(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "u", "name": "x"}, {"role": "assistant", "content": "a", "id": 1}]
    rows = [as_json({"messages": talk, f"key{number}": 1}) for number in range(500)]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(rows))
    notices = prepare(source(tmp_path / "train.jsonl", smollm2(), CHATML), tmp_path / "cache").stats.notices
    assert len(notices) == MOST + 1
    assert notices[-1] == f"train.jsonl: at least {MOST_KEYS - MOST} more keys of rows have no effect on training."
