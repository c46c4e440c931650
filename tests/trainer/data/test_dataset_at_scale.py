"""Large files and several processes: memory does not grow with the data, and nobody sees a half-made folder."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune_trainer.data import dataset
from finetune_trainer.data.dataset import TokenizedData, prepare
from tests.models import smollm2_folder
from tests.trainer.data.chatml_source import source_of
from tests.trainer.run.tiny_job import rows, write_rows

SCRIPT = """
import resource, sys
from pathlib import Path
from tests.trainer.data.chatml_source import source_of
from finetune_trainer.data.dataset import prepare

data = prepare(source_of(Path(sys.argv[1]), Path(sys.argv[3])), Path(sys.argv[2]))
print(data.folder, len(data), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def started(path: Path, cache: Path) -> subprocess.Popen[str]:
    """A process that prepares `path` and prints folder, rows and peak memory in KiB."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), str(cache), str(smollm2_folder())],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def result(process: subprocess.Popen[str]) -> tuple[Path, int, int]:
    """(folder, rows, peak memory in KiB) of a process that `started` made."""
    output, _ = process.communicate()
    assert process.returncode == 0
    folder, count, peak = output.split()
    return Path(folder), int(count), int(peak)


def large_file(path: Path, size: int) -> Path:
    """Chat rows of some hundred characters, `size` bytes in all."""
    chance = random.Random(0)
    words = [
        "what",
        "is",
        "the",
        "time",
        "of",
        "day",
        "and",
        "who",
        "may",
        "say",
        "if",
        "we",
        "can",
        "go",
        "to",
        "an",
        "old",
        "house",
        "by",
        "the",
        "sea",
        "with",
        "him",
    ]
    with path.open("w") as file:
        while file.tell() < size:
            messages = [
                {"role": "user", "content": " ".join(chance.choices(words, k=120))},
                {"role": "assistant", "content": " ".join(chance.choices(words, k=120))},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Eight times the data, of which text and arrays alone would take 40 MB more, and Python's own integers 150."""
    _, few, small = result(started(large_file(tmp_path / "small.jsonl", 3 << 20), tmp_path / "cache"))
    folder, many, large = result(started(large_file(tmp_path / "large.jsonl", 24 << 20), tmp_path / "cache"))
    assert many > 7 * few
    assert (folder / "ids.bin").stat().st_size > 20 << 20
    assert large - small < 20 << 10


def test_a_batch_of_long_rows_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of rows of a book's length would be gigabytes of tokens."""
    monkeypatch.setattr(dataset, "_BLOCK_BYTES", 1000)
    seen: list[int] = []
    source = source_of(write_rows(tmp_path / "train.jsonl", rows(60)), smollm2_folder())
    data = prepare(source, tmp_path / "cache", lambda done, total: seen.append(done))
    assert len(data) == 60
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == 60


def test_processes_at_once_agree_on_one_complete_folder(tmp_path: Path) -> None:
    """All of them read it, none leaves its own behind."""
    path = large_file(tmp_path / "train.jsonl", 300 << 10)
    found = [result(process) for process in [started(path, tmp_path / "cache") for _ in range(2)]]
    (folder,) = {folder for folder, _, _ in found}
    assert list((tmp_path / "cache").iterdir()) == [folder]
    data = TokenizedData(folder)
    assert {count for _, count, _ in found} == {len(data)}
    assert int(np.fromfile(folder / "trained.bin", dtype=np.uint8).sum()) == int(data.row_trained_tokens.sum())
