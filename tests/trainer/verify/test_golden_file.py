"""golden.jsonl comes from foreign places: it is read whole or refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.errors import JobError
from finetune_trainer.verify.golden import FILE_LIMIT_BYTES, GOLDEN, read_golden
from tests.trainer.verify.canned import case


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / GOLDEN).write_bytes(case(0).line() + case(1).line())
    assert read_golden(tmp_path) == [case(0), case(1)]


def test_an_adapter_without_golden_prompts_has_none(tmp_path: Path) -> None:
    assert read_golden(tmp_path) == []


def test_keys_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    line = json.loads(case(0).line()) | {"new": 1}
    (tmp_path / GOLDEN).write_text(json.dumps(line) + "\n")
    assert read_golden(tmp_path) == [case(0)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 2}, "line 1 (version"),
        ({"ids": []}, "line 1 (ids"),
        ({"ids": [1] * 65, "margins": [1.0] * 65}, "line 1 (ids"),
        ({"prompt_ids": [1] * 3000}, "line 1 (prompt_ids"),
        ({"ids": [1, -1, 2, 3]}, "line 1 (ids.1"),
        ({"ids": [1, True, 2, 3]}, "line 1 (ids.1"),
        ({"ids": [1, 2**40, 2, 3]}, "line 1 (ids.1"),
        ({"margins": [1.0]}, "there is not a margin for each token"),
        ({"logprobs": [0.0] * 5}, "there are more log-probs than tokens"),
        ({"messages": []}, "line 1 (messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "line 1 (messages.0.role"),
        ({"dtype": "rm -rf"}, "line 1 (dtype"),
        ({"finish": "crash"}, "line 1 (finish"),
        ({"text": None}, "line 1 (text"),
    ],
)
def test_a_line_that_is_no_case_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    line = json.loads(case(0).line()) | changes
    (tmp_path / GOLDEN).write_text(json.dumps(line) + "\n")
    with pytest.raises(JobError) as caught:
        read_golden(tmp_path)
    assert sentence in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.message.endswith("copy the adapter again, or use the version of finetune that wrote it.")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "has 0 lines"),
        (b"{}\n" * 100, "has 100 lines"),
        (b" " * (FILE_LIMIT_BYTES + 1), "has more than"),
        (b"\xff\xfe\n", "cannot be understood at line 1"),
        (b"[" * 100_000, "cannot be understood at line 1"),
        (b"null\n", "cannot be understood at line 1"),
        (case(0).line().replace(b"-0.01", b"NaN"), "cannot be understood at line 1"),
        (case(0).line()[:100], "cannot be understood at line 1"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / GOLDEN).write_bytes(data)
    with pytest.raises(JobError) as caught:
        read_golden(tmp_path)
    assert sentence in caught.value.message
