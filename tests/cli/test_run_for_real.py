"""`finetune run` with a random small model: the whole way from a job file to an adapter that answers."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.load import load_job_file
from tests.cli.command import finetune_json
from tests.models import random_llama

ROWS = 8
CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job, its data and the base model."""
    folder = tmp_path_factory.mktemp("run")
    random_llama(folder / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"Number {row}"}, {"role": "assistant", "content": "yes"}]}
        for row in range(ROWS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "model_id": str(folder / "base"),
        "train_path": str(folder / "train.jsonl"),
        "task": "instruction_tuning",
        "generation_config": {"prompt_format": {"use_hugging_face_chat_template": True}},
        "num_epochs": 1,
        "train_batch_size_per_device": 2,
        "num_warmup_steps": 1,
        "lora_config": {"r": 2},
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "finetune_cli", "run", str(folder / "job.json")]


def _on_a_terminal(command: list[str], cwd: Path) -> tuple[int, str]:
    """Exit code and everything that `command` showed, without control sequences."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=environ)
    os.close(theirs)
    shown = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not read:
            break
        shown += read
    os.close(ours)
    return child.wait(), CONTROL_SEQUENCE.sub("", shown.decode())


def test_a_run_shows_progress_and_ends_with_an_adapter_that_answers(folder: Path) -> None:
    exit_code, shown = _on_a_terminal(_command(folder), folder)
    assert exit_code == 0, shown
    assert "Running" in shown
    output = folder / "finetune-output" / "job"
    assert "Adapter  finetune-output/job/adapter" in shown
    assert "finetune chat finetune-output/job/adapter" in shown

    effective = load_job_file(output / "job.yaml").job
    assert effective is not None
    assert effective.spec.lora_config.r == 2
    (answer,) = finetune_json("chat", str(output / "adapter"), "-m", "Number 1", "--max-new-tokens", "4")
    assert answer["prompt"].endswith("<|im_start|>user\nNumber 1<|im_end|>\n<|im_start|>assistant\n")

    again = subprocess.run(_command(folder), capture_output=True, text=True, cwd=folder, check=False)
    assert again.returncode == 0, again.stderr
    assert "nothing was trained" in again.stdout
