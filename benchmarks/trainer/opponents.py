"""The opponents: TRL's trainer as shipped, and with what holds it back on a CPU put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from typing_extensions import override

from benchmarks.trainer.contestants import Contestant
from benchmarks.trainer.job import ALPHA, LEARNING_RATE, MAX_GRAD_NORM, RANK, ROWS_PER_DEVICE, BenchmarkJob
from finetune_trainer.data.dataset import TokenizedData
from finetune_trainer.model.batch import IGNORED
from finetune_trainer.train.plan import TrainingPlan


class Trl(Contestant):
    """TRL's SFTTrainer on the rows of our plan.

    Args:
        name: in the report.
        job: its data and plan are used.
        model: folder of the base model.
        scratch: an empty folder.
        rows_per_device: rows of a micro-batch; the rest of a step is accumulated.
        fair: sort a step's rows by length before they are cut into micro-batches, and run the output head where CUDA
            would run it.
        padding_free: TRL's own switch: the rows of a micro-batch in one sequence. TRL recommends flash attention for
            it, which no CPU has; without it transformers masks the rows from each other by their position ids, densely.
    """

    def __init__(
        self,
        name: str,
        job: BenchmarkJob,
        model: Path,
        scratch: Path,
        *,
        rows_per_device: int = ROWS_PER_DEVICE,
        fair: bool = False,
        padding_free: bool = False,
    ) -> None:
        self._plan: TrainingPlan = job.prepared.plan
        self._lengths = job.prepared.train.row_tokens
        self._rows_per_device, self._fair = rows_per_device, fair
        arguments = SFTConfig(
            output_dir=str(scratch),
            per_device_train_batch_size=rows_per_device,
            gradient_accumulation_steps=max(1, self._plan.rows_per_step // rows_per_device),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            # The defaults are bfloat16, which is slow on CPUs, and checkpointing, which computes twice.
            bf16=False,
            gradient_checkpointing=False,
            padding_free=padding_free,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        self._trainer: Any = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=arguments,
            train_dataset=_dataset(job.prepared.train),
            processing_class=job.prepared.model.tokenizer.tokenizer,
            peft_config=LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        super().__init__(name, self._trainer.model)
        self._trainer.create_optimizer()

    @override
    def shrink(self) -> int | None:
        # A step that ended midway has left some.
        self.model.zero_grad()
        if self._rows_per_device == 1:
            return None
        self._rows_per_device //= 2
        return self._rows_per_device

    @override
    def train(self, number: int) -> tuple[float, float]:
        """As transformers' Trainer does in its own loop."""
        with _head_as_on_cuda(self._fair):
            loss = self._backward(number)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), MAX_GRAD_NORM)
        self._trainer.optimizer.step()
        self.model.zero_grad()
        return loss, float(norm)

    @override
    def positions(self, number: int) -> int:
        return sum(batch["input_ids"].numel() for batch in self._batches(number))

    def _batches(self, number: int) -> list[Any]:
        rows = [int(row) for row in self._plan.rows_of_step(number)]
        if self._fair:
            rows.sort(key=lambda row: -int(self._lengths[row]))
        size, dataset = self._rows_per_device, self._trainer.train_dataset
        return [
            self._trainer.data_collator([dataset[row] for row in rows[start : start + size]])
            for start in range(0, len(rows), size)
        ]

    def _backward(self, number: int) -> float:
        batches = self._batches(number)
        # As Trainer's loop does before the first micro-batch of a step.
        self._trainer.current_gradient_accumulation_steps = len(batches)
        count = sum(batch["labels"][..., 1:].ne(IGNORED).sum() for batch in batches)
        losses = [self._trainer.training_step(self.model, batch, count) for batch in batches]
        return float(sum(losses))


def _dataset(data: TokenizedData) -> Dataset:
    """Our tokens in TRL's columns."""

    def columns() -> Iterator[tuple[list[int], list[int]]]:
        for row in range(len(data)):
            ((ids, trained),) = data.sequences(row)  # ChatML makes one sequence of a conversation
            yield ids.tolist(), [token if mark else IGNORED for token, mark in zip(ids.tolist(), trained, strict=True)]

    ids, labels = zip(*columns(), strict=True)
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(labels)})


def _head_as_on_cuda(on: bool) -> AbstractContextManager[object]:
    """Let TRL run the output head on supervised positions only.

    TRL 1.16 does so where Triton runs; elsewhere (`compact = _use_triton(...)` in `add_fused_lm_head`) it scores every
    position, so that tile shapes stay the same for compilers that want that. Only that question, asked under the name
    that trl.trainer.utils imports, gets another answer; the kernels ask in a module of their own and stay in torch.
    """
    return patch("trl.trainer.utils._use_triton", return_value=True) if on else nullcontext()
