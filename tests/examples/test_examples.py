"""Whoever copies an example gets a job that is accepted without a word, and one that trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import finetune, finetune_json
from tests.examples.jobs import EXAMPLES, IN_A_CLUSTER, JOBS, ExampleJob
from tests.models import random_llama

ROWS = 24


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_an_example_is_valid_and_needs_no_warning(job: ExampleJob, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(job.text)
    (answer,) = finetune_json("validate", str(file))
    assert answer == {"file": str(file), "valid": True, "errors": [], "warnings": []}


@pytest.mark.parametrize("job", IN_A_CLUSTER, ids=lambda job: job.name)
def test_a_cluster_would_get_its_objects(job: ExampleJob, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(job.text)
    result = finetune("render", str(file), "-o", "json")
    assert result.exit_code == 0, result.output
    assert [made["kind"] for made in json.loads(result.stdout)["items"]] == ["ConfigMap", "PyTorchJob"]


WANTED = ["first-job", "llama-guard-2", "llama-3", "mistral", "multi-node", "pvc", "air-gapped"]


@pytest.mark.parametrize("name", [*(f"examples/{name}" for name in WANTED), "integrations/kueue/job"])
def test_there_is_an_example_of_it(name: str) -> None:
    assert name in {job.name for job in IN_A_CLUSTER}


def test_every_file_is_in_the_list() -> None:
    page = (EXAMPLES / "README.md").read_text()
    entries = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() or path.suffix == ".yaml")
    assert [name for name in entries if not name.startswith((".", "__")) and f"]({name})" not in page] == []


def test_the_first_job_trains(tmp_path: Path) -> None:
    """With a smaller model and fewer rows, by the launcher that its pod would start."""
    data = EXAMPLES / "safety"
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text("".join((data / name).read_text().splitlines(keepends=True)[:ROWS]))
    settings = {
        "train_path": tmp_path / "train.jsonl",
        "valid_path": tmp_path / "valid.jsonl",
        "initial_base_model_ckpt_path": random_llama(tmp_path / "model"),
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "finetune_cli", "run", str(EXAMPLES / "first-job.yaml"), *options]
    ended = subprocess.run([*command, "--output-dir", str(tmp_path / "out")], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    manifest = json.loads((tmp_path / "out" / "adapter" / "manifest.json").read_text())
    assert manifest["dataset"]["rows"] == ROWS
