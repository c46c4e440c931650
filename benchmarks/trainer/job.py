"""The fine-tuning job that is measured, prepared as `finetune run` prepares it but never published."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.trainer.shapes import Row
from finetune_api.defaults import effective_job
from finetune_api.load import load_job
from finetune_api.outcome import TerminationMessage
from finetune_trainer.assemble import make_loop
from finetune_trainer.job_output import open_output
from finetune_trainer.load_adapted import load_adapted
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.preparation import Prepared, RunContext, prepare_run
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.console import Console
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.observer import TrainingObserver
from finetune_trainer.train.progress import ProgressReporter
from tests.trainer.run.tiny_job import CHATML, write_rows

RANK = 8
ALPHA = 16
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0
ROWS_PER_DEVICE = 8


class BenchmarkJob:
    """A job with its data tokenized and its plan made.

    Args:
        model: folder of the base model.
        rows: the training data.
        rows_per_step: a multiple of 8.
        folder: an empty folder for the job's files.
        seed: of the order of rows and of the LoRA weights.
    """

    def __init__(self, model: Path, rows: list[Row], *, rows_per_step: int, folder: Path, seed: int) -> None:
        data = write_rows(folder / "train.jsonl", rows)
        spec: dict[str, Any] = {
            "model_id": str(model),
            "train_path": str(data),
            "generation_config": {"prompt_format": CHATML, "stopping_sequences": ["<|im_end|>"]},
            "num_epochs": 1,
            "train_batch_size_per_device": ROWS_PER_DEVICE,
            "gradient_accumulation_steps": rows_per_step // ROWS_PER_DEVICE,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "num_warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": MAX_GRAD_NORM,
            "seed": seed,
            "lora_config": {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"},
            "output": {"uri": str(folder / "out")},
        }
        manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "benchmark"}}
        loaded = load_job(yaml.safe_dump(manifest | {"spec": spec}), source="the benchmark's job")
        if loaded.job is None:
            raise ValueError(f"The benchmark's job is not valid: {loaded.errors}")
        self._job = effective_job(loaded.job)
        self._device = torch.device("cpu")
        scratch, ranks = folder / "scratch", Ranks()
        scratch.mkdir()
        self._around = RunContext(
            ranks, Console(io.StringIO()), ProgressReporter(None), open_output(self._job, scratch, ranks), scratch
        )
        prepared = prepare_run(self._job, [], self._around, self._device)
        if isinstance(prepared, TerminationMessage):
            raise TypeError("The benchmark's job is published already, which an empty folder cannot be.")
        self.prepared: Prepared = prepared

    def load(self) -> AdaptedModel:
        """The model with its adapter, freshly loaded."""
        return load_adapted(self._job.spec, self.prepared, self._around, self._device).model

    def loop(self, model: AdaptedModel, observer: TrainingObserver | None = None) -> Loop:
        """Our training loop for this job; how rows become batches is decided here."""
        observer = observer or TrainingObserver(
            reporter=self._around.reporter,
            console=self._around.console,
            metrics_log=None,
            total_steps=self.prepared.plan.total_steps,
        )
        return make_loop(self._job.spec, self.prepared, self._around, model, observer=observer)
