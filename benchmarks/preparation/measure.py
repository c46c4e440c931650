"""The measurement: rounds of both contestants in one process, memory and a second start in processes of their own."""

from __future__ import annotations

import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.console import machine, say, three
from benchmarks.operator.usage import resident_mib
from benchmarks.trainer.shapes import rows_of
from finetune_trainer.data.dataset import prepare
from finetune_trainer.data.read import ReadReport, read_rows
from tests.models import smollm2_folder
from tests.trainer.data.chatml_source import source_of
from tests.trainer.run.tiny_job import write_rows

GROWTH = 4
"""Times the rows for the second look at memory."""

_LOOK_SECONDS = 0.05
"""Between two looks at memory."""


@dataclass(frozen=True)
class Settings:
    """What is asked for on the command line."""

    shapes: list[str]
    rows: int
    rounds: int
    seed: int


@dataclass(frozen=True)
class Cost:
    """Seconds of one run; the CPU's are those of child processes too."""

    wall: float
    cpu: float


def measure(settings: Settings) -> None:
    """Measure each shape and print its row as soon as it is there."""
    print(
        f"{machine()}, tokenizers {version('tokenizers')}; {settings.rows:,} rows, {settings.rounds} rounds, least / "
        "median / most; load of the last minute at start and end of each shape.\n"
    )
    columns = ["raw rows/s", "prepare rows/s", "prepare : raw", "raw CPU s", "prepare CPU s", "raw CPU : prepare CPU"]
    columns += ["peak MiB", f"peak MiB, {GROWTH} times the rows", "cached s", "load"]
    print(f"| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}", flush=True)
    for shape in settings.shapes:
        print(f"| {shape} | {' | '.join(_cells(shape, settings))} |", flush=True)


def _cells(shape: str, settings: Settings) -> list[str]:
    rows = settings.rows
    load = os.getloadavg()[0]
    with _data(shape, rows, settings.seed) as path:
        raw, ours = _rounds(shape, path, settings.rounds)
        few = _alone(path, path.parent / "kept")
        cached = _alone(path, path.parent / "kept")
    with _data(shape, GROWTH * rows, settings.seed) as path:
        say(f"{shape}: memory, {GROWTH * rows} rows")
        many = _alone(path, path.parent / "kept")
    pairs = list(zip(raw, ours, strict=True))
    return [
        three([rows / cost.wall for cost in raw], "{:,.0f}".format),
        three([rows / cost.wall for cost in ours], "{:,.0f}".format),
        three([one.wall / other.wall for one, other in pairs], "{:.2f}".format),
        three([cost.cpu for cost in raw], "{:.2f}".format),
        three([cost.cpu for cost in ours], "{:.2f}".format),
        three([one.cpu / other.cpu for one, other in pairs], "{:.2f}".format),
        f"{few[1]:.0f}",
        f"{many[1]:.0f}",
        f"{cached[0]:.2f}",
        f"{load:.1f}, {os.getloadavg()[0]:.1f}",
    ]


def _rounds(shape: str, path: Path, count: int) -> tuple[list[Cost], list[Cost]]:
    """Costs of the tokenizer alone and of the preparation, round by round after one that warms up."""
    source = source_of(path, smollm2_folder())
    rows = read_rows(path, source.rules, ReadReport())
    texts = [text.text for row in rows for text in source.renderer.render(row.conversation.messages)]

    def raw() -> None:
        source.tokenizer.backend.encode_batch(texts, add_special_tokens=False)

    def ours() -> None:
        # A cache of its own for each round: nothing is there yet.
        with tempfile.TemporaryDirectory(dir=path.parent) as cache:
            prepare(source, Path(cache))

    costs: tuple[list[Cost], list[Cost]] = [], []
    for number in range(count + 1):
        say(f"{shape}: round {number}")
        contestants = list(zip(costs, (raw, ours), strict=True))
        for found, run in contestants if number % 2 else contestants[::-1]:
            cost = _cost(run)
            if number:
                found.append(cost)
    return costs


def _alone(path: Path, cache: Path) -> tuple[float, float]:
    """(seconds of the preparation, peak memory in MiB with all children) in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_prepared, path, cache).result()


def _prepared(path: Path, cache: Path) -> tuple[float, float]:
    source = source_of(path, smollm2_folder())
    done, seen = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            seen[0] = max(seen[0], _resident_mib())

    watching = threading.Thread(target=watch)
    watching.start()
    seconds = _cost(lambda: prepare(source, cache)).wall
    done.set()
    watching.join()
    return seconds, max(seen[0], _resident_mib())


def _resident_mib() -> float:
    """Of this process and its children; what several have mapped counts for each."""
    pids = [os.getpid()]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pids[0]:
                pids.append(int(stat.parent.name))
    total = 0.0
    for pid in pids:
        # One that has just ended has no memory.
        with suppress(OSError, KeyError):
            total += resident_mib(pid)
    return total


@contextmanager
def _data(shape: str, rows: int, seed: int) -> Iterator[Path]:
    say(f"{shape}: {rows} rows are made")
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
        yield write_rows(Path(folder) / f"{shape}.jsonl", rows_of(shape, tokenizer, count=rows, seed=seed))


def _cost(run: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run()
    return Cost(time.perf_counter() - wall, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
