"""A complete job on a random model of 3 MB: real files, the real trainer, a second or two per run."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune_api.defaults import effective_job
from finetune_api.job import FineTuneJob
from finetune_api.load import load_job
from finetune_api.outcome import TerminationMessage
from tests.models import random_llama

CHATML = {
    "system": "<|im_start|>system\n{instruction}<|im_end|>\n",
    "user": "<|im_start|>user\n{instruction}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{instruction}<|im_end|>\n",
    "trailing_assistant": "<|im_start|>assistant\n",
}

SETTINGS: dict[str, Any] = {
    "generation_config": {"prompt_format": CHATML, "stopping_sequences": ["<|im_end|>"]},
    "num_epochs": 2,
    "train_batch_size_per_device": 4,
    "learning_rate": 5e-3,
    "num_warmup_steps": 2,
    "checkpoint_and_evaluation_frequency": {"strategy": "steps", "value": 4},
    "lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
}
"""How the random model is trained: some steps, with a checkpoint in the midst of them."""


@functools.cache
def tiny_model() -> Path:
    """Folder of the random model, made once per test session."""
    return random_llama(Path(tempfile.mkdtemp(prefix="tiny-model-")))


def rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Short conversations of different lengths, some with a system message, some with two turns."""
    found = []
    for number in range(start, start + count):
        messages = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
        messages.append({"role": "user", "content": f"What is {number} plus {number % 7}?" + " Please." * (number % 5)})
        messages.append({"role": "assistant", "content": f"It is {number + number % 7}."})
        if number % 4 == 0:
            messages.append({"role": "user", "content": "Are you sure?"})
            messages.append({"role": "assistant", "content": "Yes."})
        found.append({"messages": messages})
    return found


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    """The rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


class TinyJob:
    """A job in a folder of its own; `spec` may be changed before it is run.

    Args:
        folder: for its data and its output.
        golden: whether it writes golden prompts, which takes longer than to train it: a random model never stops.
        spec: keys of the job that are not as usual.
    """

    def __init__(self, folder: Path, *, golden: bool = False, **spec: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "out"
        train = folder / "train.jsonl"
        valid = folder / "valid.jsonl"
        if not train.exists():
            write_rows(train, rows(24))
            write_rows(valid, rows(7, start=100))
        self.spec: dict[str, Any] = {
            "model_id": str(tiny_model()),
            "train_path": str(train),
            "valid_path": str(valid),
            "task": "instruction_tuning",
            **copy.deepcopy(SETTINGS),
            "output": {"uri": str(self.output), "golden": golden},
            **spec,
        }

    def file(self) -> Path:
        """The job as a YAML file."""
        path = self.folder / "job.yaml"
        manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tiny"}}
        path.write_text(yaml.safe_dump(manifest | {"spec": self.spec}))
        return path

    def job(self) -> FineTuneJob:
        """The effective job."""
        loaded = load_job(self.file().read_text(), source="job.yaml")
        assert loaded.job is not None, loaded.errors
        return effective_job(loaded.job)

    def run(self) -> TerminationMessage:
        """Run it in this process."""
        from finetune_trainer.run import run_job
        from finetune_trainer.train.collective import Ranks

        return run_job(self.job(), [], torch.device("cpu"), Ranks())

    def losses(self) -> dict[int, float]:
        """Training loss per step, as logged."""
        return {line["step"]: line["loss"] for line in self._metrics() if "loss" in line}

    def eval_losses(self) -> dict[int, float]:
        """Validation loss per evaluated step."""
        return {line["step"]: line["eval_loss"] for line in self._metrics() if "eval_loss" in line}

    def _metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
