"""The measurement itself: every contestant runs every step, one after the other, the first one changing each time."""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers

from benchmarks.console import say
from benchmarks.trainer.contestants import Contestant, Ours
from benchmarks.trainer.job import ROWS_PER_DEVICE, BenchmarkJob
from benchmarks.trainer.memory import Peak, is_out_of_memory, limit_memory, peak_alone, peak_of
from benchmarks.trainer.opponents import Trl
from benchmarks.trainer.report import Case, case_markdown, conditions
from benchmarks.trainer.shapes import rows_of
from finetune_trainer.model.batch import TokenPair
from finetune_trainer.model.packing import common_beginning, lexicographic
from tests.models import smollm2_folder


@dataclass(frozen=True)
class Settings:
    """What is asked for on the command line."""

    shapes: list[str]
    rows: list[int]
    """Rows of a step."""
    rounds: int
    """Steps measured."""
    warm_up: int
    """Steps before them."""
    seed: int
    trl_rows: list[int]
    """Rows of a micro-batch: all are tried by trl-fair, the first by TRL as shipped."""
    fair_only: bool
    padding_free: bool
    profile: bool
    rss: bool
    memory_gib: float


@dataclass(frozen=True)
class Entry:
    """How to build a contestant; small, so that another process can be told."""

    trl: bool = False
    fair: bool = False
    padding_free: bool = False
    rows_per_device: int = ROWS_PER_DEVICE

    @property
    def name(self) -> str:
        """In the report; a micro-batch of other than 8 rows is named."""
        size = f"-{self.rows_per_device}" * (self.rows_per_device != ROWS_PER_DEVICE)
        return "trl" + "-fair" * self.fair + "-padding-free" * self.padding_free + size if self.trl else "ours"

    def build(self, job: BenchmarkJob, model: Path, scratch: Path) -> Contestant:
        """The contestant, its model loaded."""
        if not self.trl:
            return Ours(self.name, job)
        return Trl(
            self.name,
            job,
            model,
            scratch,
            fair=self.fair,
            padding_free=self.padding_free,
            rows_per_device=self.rows_per_device,
        )


def entries(settings: Settings) -> list[Entry]:
    """Ours first, which the others are compared with."""
    sizes = settings.trl_rows
    found = [Entry(), Entry(trl=True, rows_per_device=sizes[0])]
    found += [Entry(trl=True, fair=True, rows_per_device=rows) for rows in sizes]
    if settings.padding_free:
        found += [Entry(trl=True, fair=fair, padding_free=True, rows_per_device=sizes[0]) for fair in (False, True)]
    return [entry for entry in found if entry.fair or not (entry.trl and settings.fair_only)]


def measure(settings: Settings) -> None:
    """Measure all cases and print each as soon as it is there."""
    _quiet()
    print(f"{conditions()}\n", flush=True)
    for shape in settings.shapes:
        for rows in settings.rows:
            with _job(shape, rows, settings.rounds + settings.warm_up, settings.seed) as (job, model, scratch):
                case = _run(job, model, scratch, settings, shape)
            if settings.rss:
                for entry in entries(settings):
                    say(f"{shape}, {rows} rows, memory: {entry.name}")
                    case.peaks[entry.name] = peak_alone(partial(_one_step, entry, shape, rows, settings))
            print(case_markdown(case), flush=True)


def _run(job: BenchmarkJob, model: Path, scratch: Path, settings: Settings, shape: str) -> Case:
    plan, data = job.prepared.plan, job.prepared.train
    contestants = [entry.build(job, model, scratch) for entry in entries(settings)]
    for contestant in contestants[1:]:
        contestant.begin_as(contestants[0])
    case = Case(shape, plan.rows_per_step, {contestant.name: [] for contestant in contestants}, settings.warm_up)
    case.remarks = [remark for contestant in contestants if (remark := contestant.prepare())]
    for number in range(settings.warm_up + settings.rounds):
        rows = plan.rows_of_step(number)
        case.tokens.append(int(data.row_tokens[rows].sum()))
        case.trained_tokens.append(int(data.row_trained_tokens[rows].sum()))
        case.longest_row = max(case.longest_row, int(data.row_tokens[rows].max()))
        case.distinct_tokens.append(distinct_tokens([pair for row in rows for pair in data.sequences(int(row))]))
        first = number % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            if contestant.name not in case.failures:
                say(f"{shape}, {plan.rows_per_step} rows, step {number}: {contestant.name}")
                _step(contestant, number, case, settings.memory_gib)
            if contestant.name not in case.failures:
                case.positions.setdefault(contestant.name, []).append(contestant.positions(number))
    if settings.profile and contestants[0].name not in case.failures:
        case.profile = _profile(contestants[0], settings.warm_up + settings.rounds)
    return case


def distinct_tokens(sequences: list[TokenPair]) -> int:
    """Tokens that no trainer can do without: what predicts something and all before it, common beginnings once."""
    seen = [ids[: int(np.flatnonzero(trained[1:]).max(initial=0)) + 1] for ids, trained in sequences]
    seen.sort(key=lexicographic)
    return len(seen[0]) + sum(len(row) - common_beginning(last, row) for last, row in itertools.pairwise(seen))


def _step(contestant: Contestant, number: int, case: Case, memory_gib: float) -> None:
    """One step, with smaller micro-batches where it does not fit, as anybody would go on."""
    while True:
        limit_memory(memory_gib)
        try:
            case.steps[contestant.name].append(contestant.step(number))
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        smaller = contestant.shrink()
        if smaller is None:
            case.failures[contestant.name] = "does not fit into the memory allowed"
            say(f"{contestant.name} {case.failures[contestant.name]}")
            return
        case.shrunk[contestant.name] = smaller
        say(f"{contestant.name} does not fit into the memory allowed: {smaller} rows at a time")


def _profile(contestant: Contestant, number: int) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        contestant.step(number)
    table: str = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60)
    return table


def _one_step(entry: Entry, shape: str, rows: int, settings: Settings) -> Peak:
    """The memory of one step, in a process that has done nothing else."""
    _quiet()
    with _job(shape, rows, 1, settings.seed) as (job, model, scratch):
        contestant = entry.build(job, model, scratch)
        contestant.prepare()
        limit_memory(settings.memory_gib)
        return peak_of(lambda: contestant.step(0))


@contextmanager
def _job(shape: str, rows: int, steps: int, seed: int) -> Iterator[tuple[BenchmarkJob, Path, Path]]:
    """A job with data for the steps and one to profile; its model; a folder for the others' files."""
    model = smollm2_folder()
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as name:
        folder = Path(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        data = rows_of(shape, tokenizer, count=rows * (steps + 1), seed=seed)
        # Tokens go there too; the model stays in the cache.
        with patch.dict(os.environ, FINETUNE_CACHE_DIR=str(folder / "cache")):
            job = BenchmarkJob(model, data, rows_per_step=rows, folder=folder, seed=seed)
            yield job, model, folder / "trl"


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
