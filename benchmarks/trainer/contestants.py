"""What a contestant is, and ours: a step is a step of its own loop: data, forward, backward, clipping, AdamW.

All contestants train the same tokens from the same LoRA weights.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from benchmarks.trainer.job import BenchmarkJob
from finetune_trainer.train.batching import computed_of
from finetune_trainer.train.loop import Loop


@dataclass(frozen=True)
class Step:
    """What one optimizer step took and gave."""

    wall_seconds: float
    cpu_seconds: float
    """Of all threads of this process."""
    loss: float
    gradient_norm: float
    """Before clipping; unlike the loss it shows whether gradients are scaled alike."""


class Contestant(ABC):
    """A trainer that is driven step by step.

    Args:
        name: in the report.
        model: a PeftModel on the CPU; others may use its frozen weights.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self.model = model
        self.trainable = {key: value for key, value in model.named_parameters() if value.requires_grad}

    @abstractmethod
    def train(self, number: int) -> tuple[float, float]:
        """Make optimizer step `number`; its loss, and the norm of its gradient before clipping."""

    @abstractmethod
    def positions(self, number: int) -> int:
        """Positions that the model is run on in optimizer step `number`, padding too."""

    def prepare(self) -> str:
        """What the trainer does once, before its first step; a sentence about it, or nothing."""
        return ""

    def shrink(self) -> int | None:
        """Use smaller micro-batches from now on; their rows, or None when they cannot be smaller."""
        return None

    def step(self, number: int) -> Step:
        """Make optimizer step `number` and take its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        loss, norm = self.train(number)
        return Step(time.perf_counter() - wall, time.process_time() - cpu, loss, norm)

    def begin_as(self, other: Contestant) -> None:
        """Take `other`'s LoRA weights, and its frozen ones in place of an equal copy, which saves memory.

        Raises:
            ValueError: they do not train the same parameters.
        """
        if self.trainable.keys() != other.trainable.keys():
            raise ValueError(f"{self.name} and {other.name} do not train the same parameters.")
        frozen = dict(other.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            if name in self.trainable:
                parameter.data.copy_(other.trainable[name].data)
            elif name in frozen:
                parameter.data = frozen[name].data


class Ours(Contestant):
    """The trainer of this repository, assembled as a job assembles it."""

    def __init__(self, name: str, job: BenchmarkJob) -> None:
        self._job = job
        self._adapted = job.load()
        self._loop: Loop | None = None
        super().__init__(name, self._adapted.peft)

    @override
    def prepare(self) -> str:
        began, cpu = time.perf_counter(), time.process_time()
        self._loop = self._job.loop(self._adapted)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        self.model.train()
        choice = self._loop.runner.choice
        layout, packs = choice.batching.layout.value, choice.batching.tokens_per_pack
        shared = ", what several begin with computed once" if choice.batching.prefixes else ""
        return (
            f"Ours: layout {layout}, packs of at most {packs:,} tokens{shared}; before the first step the gate and "
            f"what it needs took {wall:.1f} s, {cpu:.1f} CPU s. Gradients of the sample differ by "
            f"{choice.verdict.gradient_difference or 0:.1e} from one row at a time."
        )

    @override
    def train(self, number: int) -> tuple[float, float]:
        """As `finetune_trainer.train.loop.train`, which makes all steps in one go."""
        if self._loop is None:
            raise RuntimeError("a step before prepare")
        loop = self._loop
        loss = loop.gradients.reduce(loop.runner.run(number).loss)
        norm = loop.gradients.clip(loop.max_grad_norm)
        for group in loop.optimizer.param_groups:
            group["lr"] = loop.learning_rate * loop.schedule.share(number)
        loop.optimizer.step()
        return float(loss), float(norm)

    @override
    def positions(self, number: int) -> int:
        if self._loop is None:
            raise RuntimeError("a step before prepare")
        return sum(computed_of(batch) for batch in self._loop.runner.batches(number).batches)
