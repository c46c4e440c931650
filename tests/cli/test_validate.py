"""`finetune validate`: shape of its answer, and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import finetune, finetune_json
from tests.hub_server import Hub, Repo
from tests.models import smollm2_folder

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


TEMPLATE = (
    "model_id: {}\ntrain_path: data.jsonl\ntask: instruction_tuning\nlora_config: {{r: 8}}\n"
    "generation_config: {{prompt_format: {{use_hugging_face_chat_template: true}}}}\n"
)


def _tokenizer(template: str) -> dict[str, bytes]:
    """SmolLM2's tokenizer with another chat template, as the files of a model folder."""
    files = {file.name: file.read_bytes() for file in smollm2_folder().iterdir() if "safetensors" not in file.name}
    return files | {"chat_template.jinja": template.encode()}


ENDS_NOTHING = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "warned"),
    [(ENDS_NOTHING, ["learns to stop"]), (ENDS_NOTHING.replace("}}", "}}<|im_end|>"), []), ("", ["has none"])],
)
def test_a_chat_template_in_a_folder_is_looked_at(tmp_path: Path, template: str, warned: list[str]) -> None:
    """Of the job's own text nothing can be said, since the template ends the answers."""
    model = tmp_path / "model"
    model.mkdir()
    for name, content in _tokenizer(template).items():
        (model / name).write_bytes(content)
    (answer,) = finetune_json("validate", _file(tmp_path, TEMPLATE.format(model)))
    assert answer["valid"] is True
    found = [each for each in answer["warnings"] if each["path"] == "generation_config.prompt_format"]
    assert len(found) == len(warned)
    assert all(words in each["message"] for words, each in zip(warned, found, strict=True))


def test_a_chat_template_of_the_hub_is_looked_at_where_the_cache_has_it(tmp_path: Path, hub: Hub) -> None:
    """Validating asks the network for nothing."""
    from finetune_trainer.storage import fetch_tokenizer

    hub.repos["acme/model"] = Repo(_tokenizer(ENDS_NOTHING))
    file = _file(tmp_path, TEMPLATE.format("acme/model"))
    (before,) = finetune_json("validate", file)
    assert hub.requests == []
    fetch_tokenizer("acme/model")
    asked = len(hub.requests)
    (after,) = finetune_json("validate", file)
    assert len(hub.requests) == asked
    more = [each["message"] for each in after["warnings"] if each not in before["warnings"]]
    assert len(more) == 1
    assert "learns to stop" in more[0]
