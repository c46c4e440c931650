"""The measurement itself: for each shape of data one run of the trainer, watched step by step."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

from benchmarks.console import say
from benchmarks.gpu.clock import StepClock, stages
from benchmarks.gpu.devices import NotMeasurableError, device_name, give_back, peak_tflops
from benchmarks.gpu.figures import parameters_of, work_of
from benchmarks.gpu.job import GpuJob
from benchmarks.gpu.kernels import compare_kernels
from benchmarks.gpu.models import existing_model, random_model
from benchmarks.gpu.report import Case, case_markdown, conditions, kernels_markdown
from benchmarks.trainer.job import ROWS_PER_DEVICE
from benchmarks.trainer.shapes import SHAPES, rows_of
from finetune_api.outcome import BatchLayout
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import training_dtype
from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.trainer import StepTrainer


@dataclass(frozen=True)
class Settings:
    """What is asked for on the command line."""

    device: torch.device
    model: str | None
    """A folder or a name on the Hub; None for SmolLM2-135M-Instruct."""
    random: list[int] | None
    """Sizes of a random model instead."""
    shapes: list[str]
    rows: int
    """Rows of a step."""
    steps: int
    """Steps measured."""
    warm_up: int
    """Steps before them."""
    seed: int
    peak_tflops: float | None
    compare: str | None
    """"padded", or nothing."""
    padded_rows: int
    kernels: bool

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            NotMeasurableError: a number or a shape is none that there is.
        """
        if self.rows < 1 or self.rows % ROWS_PER_DEVICE:
            raise NotMeasurableError(f"--rows must be a multiple of {ROWS_PER_DEVICE}.")
        if min(self.steps, self.warm_up, self.padded_rows) < 1:
            raise NotMeasurableError("--steps, --warm-up and --padded-rows must be 1 or more.")
        unknown = [shape for shape in self.shapes if shape not in SHAPES]
        if unknown:
            raise NotMeasurableError(f"--shapes knows {', '.join(SHAPES)}, but not {', '.join(unknown)}.")


def measure(settings: Settings) -> None:
    """Measure all shapes and print each as soon as it is there.

    Raises:
        NotMeasurableError: what is asked for cannot be measured.
    """
    settings.check()
    with _quiet(), tempfile.TemporaryDirectory(prefix="finetune-bench-model-") as scratch:
        if settings.random is None:
            model, name = existing_model(settings.model), settings.model or "SmolLM2-135M-Instruct"
        else:
            say("drawing random weights")
            model = random_model(Path(scratch), settings.random, settings.device)
            name = f"a random Llama of {','.join(map(str, settings.random))}"
        peak = settings.peak_tflops or peak_tflops(device_name(settings.device))
        print(f"{conditions(settings.device, name, peak)}\n", flush=True)
        for shape in settings.shapes:
            _measure_shape(model, shape, settings, peak)
            # The model goes before the next one comes.
            gc.collect()
            give_back(settings.device)


def _measure_shape(model: Path, shape: str, settings: Settings, peak: float | None) -> None:
    planned = stages(warm_up=settings.warm_up, steps=settings.steps, compare=settings.compare is not None)
    order = tuple(stage.rows_of for stage in planned)
    clock = StepClock(planned, settings.device, settings.padded_rows)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune-bench-")))
        # Tokens go there; the model stays where it is.
        stack.enter_context(patch.dict(os.environ, FINETUNE_CACHE_DIR=str(folder / "cache")))
        say(f"{shape}: making the data")
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        rows = rows_of(shape, tokenizer, count=settings.rows * (max(order) + 1), seed=settings.seed)
        job = GpuJob(
            model,
            rows,
            rows_per_step=settings.rows,
            order=order,
            folder=folder,
            seed=settings.seed,
            device=settings.device,
        )
        say(f"{shape}: loading the model")
        trainer = job.trainer(clock)
        say(f"{shape}: {len(planned)} steps of {settings.rows} rows")
        failure = ""
        try:
            trainer.train()
        except JobError as error:
            failure = error.message
        print(case_markdown(_case(shape, settings.rows, trainer, clock, peak, failure)), flush=True)
        if settings.kernels and clock.choice is not None:
            say(f"{shape}: kernels")
            _measure_kernels(trainer, clock.choice, settings.device)


def _case(shape: str, rows: int, trainer: StepTrainer, clock: StepClock, peak: float | None, failure: str) -> Case:
    data: Any = trainer.train_dataset  # our StepDataset
    works = []
    timed = [step for step in clock.timed if step.stage.measured]
    for step in timed:
        data.batching = step.batching
        works.append(work_of(data[step.number]))
    before = sum(step.graphs for step in clock.timed if not step.stage.measured)
    return Case(
        shape=shape,
        rows=rows,
        choice=clock.choice,
        choosing_seconds=clock.choosing_seconds,
        steps=list(zip(timed, works, strict=True)),
        parameters=parameters_of(trainer.peft_model),
        peak_tflops=peak,
        graphs_before=before,
        remarks=[*clock.halvings, *([failure] if failure else [])],
    )


def _measure_kernels(trainer: StepTrainer, choice: Choice, device: torch.device) -> None:
    data: Any = trainer.train_dataset
    config = trainer.peft_model.get_base_model().config.get_text_config()
    data.batching = replace(choice.batching, layout=BatchLayout.SHARED_PREFIX)
    pack = next(batch for batch in data[0].batches if isinstance(batch, Pack))
    print(kernels_markdown(compare_kernels(pack, config, device, training_dtype(device))), flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says nothing but errors in here."""
    verbosity, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bar:
            transformers.logging.enable_progress_bar()
