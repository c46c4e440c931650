"""`finetune render`: what a cluster would get, exactly, and why it would get nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from finetune_api.load import load_job_file
from finetune_operator.desired import job_config_map, pytorch_job
from finetune_operator.desired.fingerprint import FINGERPRINT_ANNOTATION, is_edited
from finetune_operator.settings import OperatorSettings
from tests.cli.command import finetune, finetune_json

UID = "7dd8f03f-1111-2222-3333-444444444444"
PLACEHOLDER = "00000000-0000-0000-0000-000000000000"
NEVER_LOADED = ("torch", "transformers", "peft", "numpy", "huggingface_hub", "kopf", "kubernetes", "aiohttp", "boto3")

BARE = """
model_id: meta-llama/Meta-Llama-3-8B-Instruct
train_path: s3://data/train.jsonl
task: instruction_tuning
lora_config: {r: 8}
output_dir: s3://models/team
"""

# Texts that YAML readers disagree about, and texts of several lines.
MANIFEST = """
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: guard, namespace: team-a, labels: {kueue.x-k8s.io/queue-name: "017"}}
spec:
  model_id: acme/model
  train_path: pvc://data/train.jsonl
  task: causal_lm
  lora_config: {r: 8}
  generation_config:
    prompt_format:
      system: "{instruction}"
      user: "<user>\\n{instruction}\\n"
      assistant: "<assistant>\\n{instruction} </s>"
      default_system_message: "yes\\n  indented \\n\\ttab: 1e-4\\n"
  output: {uri: pvc://models/out}
  workers:
    nodes: 2
    env: [{name: TRICKY, value: "1e-4"}, {name: "ON", value: "on"}]
"""


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """Path of a FineTuneJob."""
    return _written(tmp_path, MANIFEST)


def _written(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text)
    return str(path)


def _objects(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(result.stdout))


def test_the_objects_are_those_that_the_operator_creates(manifest: str) -> None:
    job = load_job_file(manifest).job
    assert job is not None
    job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"uid": UID})})
    settings = OperatorSettings()
    assert _objects(finetune("render", manifest, "--uid", UID)) == [
        job_config_map(job, 1, settings),
        pytorch_job(job, 1, settings),
    ]


def test_the_operator_would_not_take_it_for_edited(manifest: str) -> None:
    _, job = _objects(finetune("render", manifest))
    assert FINGERPRINT_ANNOTATION in job["metadata"]["annotations"]
    assert not is_edited(job)


def test_json_is_one_list_that_kubectl_takes(manifest: str) -> None:
    made = finetune_json("render", manifest)
    assert (made["apiVersion"], made["kind"]) == ("v1", "List")
    assert made["items"] == _objects(finetune("render", manifest))


def test_the_job_in_the_config_map_is_a_block_that_people_can_read(manifest: str) -> None:
    printed = finetune("render", manifest).stdout
    assert (
        '\n  job.yaml: |\n    {\n      "apiVersion": "finetune.dev/v1alpha1",\n      "kind": "FineTuneJob",\n'
        in printed
    )


def test_a_file_without_uid_gets_a_placeholder_and_a_word_about_it(manifest: str) -> None:
    result = finetune("render", manifest)
    config, job = _objects(result)
    for made in (config, job):
        assert made["metadata"]["ownerReferences"][0]["uid"] == PLACEHOLDER
    assert f"carry a placeholder ({PLACEHOLDER}): give the job's own with --uid" in result.stderr
    assert finetune("render", manifest, "--uid", UID).stderr.count("placeholder") == 0


def test_namespace_uid_attempt_and_keys_can_be_given(manifest: str) -> None:
    arguments = ("--namespace", "elsewhere", "--uid", UID, "--attempt", "3", "--set", "workers.nodes=4")
    config, job = _objects(finetune("render", manifest, *arguments))
    for made in (config, job):
        assert made["metadata"]["name"] == "guard-7dd8f03f-3"
        assert made["metadata"]["namespace"] == "elsewhere"
        assert made["metadata"]["labels"]["finetune.dev/attempt"] == "3"
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 4


def test_a_bare_configuration_goes_to_the_default_namespace(tmp_path: Path) -> None:
    config, _ = _objects(finetune("render", _written(tmp_path, BARE)))
    assert config["metadata"]["namespace"] == "default"
    assert config["metadata"]["name"] == "job-00000000-1"


def test_settings_are_the_operators_own_variables(manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_OPERATOR_TRAINER_IMAGE", "registry.example/trainer:2")
    _, job = _objects(finetune("render", manifest))
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example/trainer:2"


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("FINETUNE_OPERATOR_TRAINER_IMAGES", "x", "FINETUNE_OPERATOR_TRAINER_IMAGES is no setting"),
        ("FINETUNE_OPERATOR_CONCURRENCY", "0", "FINETUNE_OPERATOR_CONCURRENCY: "),
        ("FINETUNE_OPERATOR_ACCELERATOR_NODE_SELECTORS", "{", "accelerator_node_selectors"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(
    manifest: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, part: str
) -> None:
    monkeypatch.setenv(variable, value)
    result = finetune("render", manifest)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BARE.replace("task", "tusk"), "job.yaml: tusk: "),
        (BARE.replace("s3://models/team", "/mnt/local_storage"), "job.yaml: output_dir: /mnt/local_storage"),
        (BARE.replace("s3://data/train.jsonl", "train.jsonl"), "job.yaml: train_path: train.jsonl is a local path"),
        (BARE.replace("output_dir: s3://models/team", ""), "job.yaml: output: output is required"),
        (MANIFEST.replace("TRICKY", "PET_NNODES"), "job.yaml: spec.workers.env[0]: PET_NNODES cannot be set"),
        (MANIFEST.replace("causal_lm", "dpo"), "job.yaml: spec.task: "),
    ],
)
def test_a_job_that_cannot_be_done_is_refused_where_its_author_wrote_it(tmp_path: Path, text: str, part: str) -> None:
    result = finetune("render", _written(tmp_path, text))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert part in result.stderr


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("deepspeed={config_path: x}", "deepspeed has no effect here"),
        ("worker_resources={accelerator_type:H100: 0.001}", "H100 has no effect, since this operator has no node"),
        ("suspend=true", "spec.suspend: the job is suspended"),
        ("learning_rate=", "learning_rate is empty"),
    ],
)
def test_warnings_are_said_once_and_keep_out_of_the_answer(manifest: str, change: str, part: str) -> None:
    result = finetune("render", manifest, "--set", change, "--uid", UID)
    assert len(_objects(result)) == 2
    assert result.stderr.count(part) == 1


def test_it_is_quick_since_nothing_large_is_loaded(manifest: str) -> None:
    # Modules instead of seconds: a busy machine must not fail this test.
    script = (
        "import sys\n"
        "from finetune_cli.main import app\n"
        f"try:\n    app(['render', {manifest!r}, '-o', 'json'])\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('LOADED', [name for name in {NEVER_LOADED!r} if name in sys.modules])\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    answer, loaded = printed.splitlines()
    assert json.loads(answer)["kind"] == "List"
    assert loaded == "LOADED []"


def test_without_the_operators_libraries_it_says_what_to_install(manifest: str) -> None:
    script = (
        "import sys\n"
        "sys.modules['pydantic_settings'] = None\n"
        "from finetune_cli.main import app\n"
        f"app(['render', {manifest!r}])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ)
    assert ended.returncode == 2
    assert "pip install 'finetune-operator[operator]'" in ended.stderr
    assert "Traceback" not in ended.stderr
