"""The measurement itself: for each shape of data one run of the trainer, watched step by step."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

from benchmarks.console import say
from benchmarks.gpu.clock import StepClock, TimedStep, stages
from benchmarks.gpu.devices import NotMeasurableError, device_name, give_back, peak_tflops
from benchmarks.gpu.figures import Work, parameters_of, work_of
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
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.loop import Loop, train
from finetune_trainer.train.steps import StepBatches


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
        adapted = job.load()
        say(f"{shape}: {len(planned)} steps of {settings.rows} rows")
        loop, failures = None, []
        try:
            loop = clock.watch(partial(job.loop, adapted))
            train(loop)
        except JobError as error:
            failures.append(error.message)
        case = Case(
            shape=shape,
            rows=settings.rows,
            choice=clock.choice,
            choosing_seconds=clock.choosing_seconds,
            steps=_works(clock, loop) if loop is not None else [],
            parameters=parameters_of(adapted.peft),
            peak_tflops=peak,
            graphs_before=sum(step.graphs for step in clock.timed if not step.stage.measured),
            remarks=[*clock.halvings, *failures],
        )
        print(case_markdown(case), flush=True)
        if settings.kernels and loop is not None:
            say(f"{shape}: kernels")
            _measure_kernels(loop, settings.device)


def _works(clock: StepClock, loop: Loop) -> list[tuple[TimedStep, Work]]:
    """The measured steps, and what each computed."""
    timed = [step for step in clock.timed if step.stage.measured]
    return [(step, work_of(_batches(loop, step.number, step.batching))) for step in timed]


def _batches(loop: Loop, step: int, batching: Batching) -> StepBatches:
    """What `step` computes where rows become batches so."""
    loop.runner.choice = replace(loop.runner.choice, batching=batching)
    return loop.runner.batches(step)


def _measure_kernels(loop: Loop, device: torch.device) -> None:
    config = loop.model.base.config.get_text_config()
    found = _batches(loop, 0, replace(loop.runner.choice.batching, layout=BatchLayout.SHARED_PREFIX)).batches
    pack = next(batch for batch in found if isinstance(batch, Pack))
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
