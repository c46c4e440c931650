"""`finetune serve-notes`: what is printed for which folder, and what of it programs can read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.outcome import EXIT_CODES, Reason
from finetune_trainer.publish.serving_targets import Target
from tests.cli.command import finetune, finetune_json
from tests.trainer.publish.serving import write_adapter


def test_commands_name_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "out" / "adapter")
    monkeypatch.chdir(tmp_path)
    for name in ("out", "out/adapter", str(folder)):
        shown = finetune("serve-notes", name, "--for", "vllm")
        assert shown.exit_code == 0
        assert f"--lora-modules guard={folder} \\\n" in shown.stdout
        assert f"--generation-config {folder}\n" in shown.stdout
        assert "KServe" not in shown.stdout


def test_without_a_server_all_are_shown(tmp_path: Path) -> None:
    shown = finetune("serve-notes", str(write_adapter(tmp_path))).stdout
    titles = ["vLLM", "Transformers and PEFT", "KServe", "Ray Serve LLM", "KAITO", "Ollama"]
    assert shown.startswith("# How to serve this adapter\n")
    assert [line for line in shown.split("\n") if line.startswith("## ")] == [f"## {title}" for title in titles]


def test_name_and_base_are_the_users_where_they_are_given(tmp_path: Path) -> None:
    folder = str(write_adapter(tmp_path))
    shown = finetune("serve-notes", folder, "--for", "vllm", "--name", "it's", "--base-model", "/m").stdout
    assert "vllm serve /m \\\n" in shown
    assert "'it'\"'\"'s=" in shown


@pytest.mark.parametrize(
    ("spec", "base"),
    [
        ("model_id: {here}", "{here}"),
        ("{{model_id: acme/model, initial_base_model_ckpt_path: {here}}}", "{here}"),
        ("model_id: acme/model", "acme/model"),
        ("model_id: {here}/gone", "acme/model"),
        ("model_id: s3://bucket/model", "acme/model"),
        ("[", "acme/model"),
    ],
)
def test_weights_that_the_job_beside_found_on_this_machine_are_named(tmp_path: Path, spec: str, base: str) -> None:
    here = tmp_path / "model"
    here.mkdir()
    folder = write_adapter(tmp_path / "out" / "adapter")
    rest = "train_path: a.jsonl, generation_config: {prompt_format: {use_hugging_face_chat_template: true}}"
    body = spec.format(here=here).strip("{}")
    (tmp_path / "out" / "job.yaml").write_text(f"{{{body}, {rest}}}" if body != "[" else body)
    shown = finetune("serve-notes", str(folder), "--for", "vllm").stdout
    assert f"vllm serve {base.format(here=here)} \\\n" in shown


def test_programs_get_the_facts_and_each_part(tmp_path: Path) -> None:
    folder = str(write_adapter(tmp_path, config={"r": 24}, stopping_sequences=("###",)))
    found = finetune_json("serve-notes", folder)
    assert list(found.pop("notes")) == [target.value for target in Target]
    assert found == {
        "name": "guard",
        "base_model": "acme/model",
        "rank": 24,
        "max_lora_rank": 32,
        "stop_token_ids": [2],
        "stop": ["###"],
    }
    assert list(finetune_json("serve-notes", folder, "--for", "ray")["notes"]) == ["ray"]


def test_a_wrong_folder_is_one_sentence(tmp_path: Path) -> None:
    shown = finetune("serve-notes", str(tmp_path / "nowhere"))
    assert shown.exit_code == EXIT_CODES[Reason.MODEL_NOT_FOUND]
    assert shown.stderr == (
        f"ModelNotFound: There is no folder {tmp_path / 'nowhere'}: name the folder `adapter` of a finished job.\n"
    )
    (write_adapter(tmp_path) / "adapter_config.json").write_text("{}")
    shown = finetune("serve-notes", str(tmp_path))
    assert shown.exit_code == EXIT_CODES[Reason.INVALID_SPEC]
    assert "is no LoRA adapter's (r: None)" in shown.stderr


def test_a_folder_whose_name_is_no_text_is_printed_as_it_is(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "caf\udce9")
    shown = finetune("serve-notes", str(folder), "--for", "vllm")
    assert shown.exit_code == 0
    assert b"caf\xe9/chat_template.jinja" in shown.stdout_bytes


def test_nothing_that_loads_models_is_imported(tmp_path: Path) -> None:
    """It answers at once."""
    program = (
        "import sys\nfrom finetune_cli.main import app\n"
        f"app(['serve-notes', {str(write_adapter(tmp_path))!r}], standalone_mode=False)\n"
        "slow = {'torch', 'transformers', 'peft', 'huggingface_hub', 'tokenizers', 'boto3'} & set(sys.modules)\n"
        "sys.exit(', '.join(slow) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
