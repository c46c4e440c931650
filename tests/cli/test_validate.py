"""`finetune validate`: shape of its answer, and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import finetune, finetune_json

VALID = "model_id: meta-llama/Meta-Llama-3-8B-Instruct\ntrain_path: data.jsonl\ntask: causal_lm\nlora_config: {r: 8}\n"
WARNED = VALID + "deepspeed: {config_path: zero3.json}\n"
INVALID = "model_id: meta-llama/Meta-Llama-3-8B-Instruct\ntrain_path: data.jsonl\nlearning_rat: 1e-4\n"


def _file(folder: Path, text: str, name: str = "job.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_errors_name_the_place_and_what_to_do(tmp_path: Path) -> None:
    file = _file(tmp_path, INVALID)
    (answer,) = finetune_json("validate", file, exit_code=1)
    assert answer["file"] == file
    assert answer["valid"] is False
    assert [error["path"] for error in answer["errors"]] == ["learning_rat"]
    assert "learning_rate" in answer["errors"][0]["message"]


def test_warnings_leave_a_job_valid(tmp_path: Path) -> None:
    (answer,) = finetune_json("validate", _file(tmp_path, WARNED))
    assert answer["valid"] is True
    assert [warning["path"] for warning in answer["warnings"]] == ["deepspeed"]


def test_one_bad_file_among_good_ones_decides_the_exit_code(tmp_path: Path) -> None:
    files = [_file(tmp_path, VALID, "good.yaml"), _file(tmp_path, INVALID, "bad.yaml")]
    answers = finetune_json("validate", *files, exit_code=1)
    assert [(answer["file"], answer["valid"]) for answer in answers] == [(files[0], True), (files[1], False)]


@pytest.mark.parametrize(
    ("text", "exit_code", "shown"),
    [(VALID, 0, "valid"), (WARNED, 0, "warning: deepspeed:"), (INVALID, 1, "error: learning_rat:")],
)
def test_text_says_the_same(tmp_path: Path, text: str, exit_code: int, shown: str) -> None:
    result = finetune("validate", _file(tmp_path, text))
    assert result.exit_code == exit_code
    assert shown in result.stdout


def test_a_missing_file_is_an_error_and_no_crash(tmp_path: Path) -> None:
    (answer,) = finetune_json("validate", str(tmp_path / "none.yaml"), exit_code=1)
    assert "does not exist" in answer["errors"][0]["message"]
