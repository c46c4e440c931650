"""Several processes tokenize as one: the same bytes, the same sentences, and none of them is left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.outcome import Reason
from finetune_api.prompt_format import PromptFormat
from finetune_trainer.data import dataset, workers
from finetune_trainer.data.dataset import DataSource, prepare
from finetune_trainer.data.render import FormatRenderer
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.errors import JobError
from tests.models import smollm2_folder
from tests.real_tokenizers import smollm2
from tests.trainer.data.deadly_renderer import FATAL, SLEEP_SECONDS, DeadlyRenderer
from tests.trainer.data.test_dataset import source
from tests.trainer.data.tokenizer_variants import ALL
from tests.trainer.run.tiny_job import CHATML, rows, write_rows

ROOT = Path(__file__).parents[3]

BARE = {"system": "{instruction}", "user": "{instruction}", "assistant": "{instruction}"}


@pytest.fixture
def with_workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of processes, for blocks of a few rows."""
    monkeypatch.setattr(dataset, "_BLOCK_BYTES", 2000)
    return lambda count: monkeypatch.setattr(dataset, "worker_count", lambda _: count)


def odd_rows() -> list[dict[str, Any]]:
    """Rows that repeat, that need several sequences, that have unknown keys, that are not ASCII."""
    odd = [("hi", "\nyes"), ("e", "\u0301 is an accent"), ("日本 <|im_end|>", "\x00 <s>"), ("a 🙂", " b")]
    made: list[dict[str, Any]] = []
    for number in range(60):
        made += rows(60)[number : number + 1]
        talk = [
            {"role": role, "content": text}
            for turn in odd
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        made.append({"messages": talk[2 * (number % 4) :], "id": number})
    return made


def outcome(data: DataSource, cache: Path) -> dict[str, bytes] | str:
    """The files, or the sentence."""
    try:
        folder = prepare(data, cache).folder
    except JobError as error:
        return f"{error.reason}: {error.message}"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_both_ways(data: DataSource, folder: Path, with_workers: Callable[[int], None]) -> dict[str, bytes] | str:
    """What comes out, in this process as in three."""
    with_workers(0)
    here = outcome(data, folder / "here")
    with_workers(3)
    assert outcome(data, folder / "there") == here
    return here


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("made", [CHATML, BARE], ids=["chatml", "bare"])
def test_the_files_are_the_same(
    name: str, made: dict[str, Any], tmp_path: Path, with_workers: Callable[[int], None]
) -> None:
    data = source(write_rows(tmp_path / "train.jsonl", odd_rows()), ALL[name](), made, max_dropped_share=1.0)
    with_workers(0)
    limit = int(np.median(prepare(data, tmp_path / "whole").row_tokens))
    found = same_both_ways(replace(data, context_length=limit), tmp_path, with_workers)
    assert isinstance(found, dict)
    stats = json.loads(found["stats.json"])
    assert stats["kept_rows"] > 40
    assert stats["truncated_rows"] > 0
    assert "60 rows have the key 'id'" in stats["notices"][0]


@pytest.mark.parametrize("bad", [5, 15])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_bad_rows_are_counted_and_named_the_same(
    bad: int, share: float, tmp_path: Path, with_workers: Callable[[int], None]
) -> None:
    path = write_rows(tmp_path / "train.jsonl", rows(80))
    lines = path.read_text().splitlines()
    for number in range(bad):
        lines[5 * number] = ["", '{"messages": 1}', "no json", "[]"][number % 4]
    path.write_text("\ufeff" + "\n".join(lines))
    same_both_ways(source(path, smollm2(), CHATML, max_invalid_share=share), tmp_path, with_workers)


def test_rows_with_two_bos_and_rows_without_a_target_are_noticed_the_same(
    tmp_path: Path, with_workers: Callable[[int], None]
) -> None:
    model = ALL["llama 3"]()
    path = write_rows(tmp_path / "train.jsonl", rows(30))
    twice = source(path, model, CHATML | {"bos": "<|begin_of_text|><|begin_of_text|>"})
    found = same_both_ways(twice, tmp_path, with_workers)
    assert isinstance(found, dict)
    assert b"30 rows begin with two BOS" in found["stats.json"]
    short = same_both_ways(replace(twice, context_length=4), tmp_path, with_workers)
    assert isinstance(short, str)
    assert "30 of 30 rows have nothing left" in short


def deadly(path: Path, model: ModelTokenizer, death: str) -> DataSource:
    """Rows of which the 30th is fatal."""
    data = rows(60)
    data[29]["messages"][-1]["content"] = FATAL
    write_rows(path, data)
    renderer = DeadlyRenderer(FormatRenderer(PromptFormat.model_validate(CHATML), None), death)
    return source(path, model, CHATML, renderer=renderer)


def test_what_a_worker_raises_is_raised(tmp_path: Path, with_workers: Callable[[int], None]) -> None:
    with_workers(3)
    with pytest.raises(MemoryError, match="no more"):
        prepare(deadly(tmp_path / "train.jsonl", smollm2(), "exception"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("kills", "reason"),
    [([3, 4], Reason.OUT_OF_MEMORY), ([3, 3], Reason.INTERNAL_ERROR), ([None] * 2, "InternalError")],
)
def test_a_worker_that_dies_ends_it_with_what_is_known(
    kills: list[int | None],
    reason: str,
    tmp_path: Path,
    with_workers: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "oom_kills", iter(kills).__next__)
    with_workers(3)
    with pytest.raises(JobError, match="A process that tokenized train") as raised:
        prepare(deadly(tmp_path / "train.jsonl", smollm2(), "SIGKILL"), tmp_path / "cache")
    assert raised.value.reason == reason
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("count", [0, 3])
def test_a_block_that_never_comes_ends_it_with_its_lines(
    count: int, tmp_path: Path, with_workers: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = deadly(tmp_path / "train.jsonl", smollm2(), "sleep")
    with_workers(count)
    monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 5.0)
    started = time.monotonic()
    with pytest.raises(
        JobError, match=r"train.jsonl: the rows in lines \d+ to \d+ were not tokenized within 0 minutes"
    ):
        prepare(data, tmp_path / "cache")
    assert time.monotonic() - started < SLEEP_SECONDS
    assert list((tmp_path / "cache").iterdir()) == []


SCRIPT = """
import os, sys
from pathlib import Path
from tests.trainer.data.chatml_source import source_of
from finetune_trainer.data import dataset
from finetune_trainer.signals import StopRequested, stop_at_once

def children():
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    return [stat.split()[0] for stat in stats if stat.rpartition(")")[2].split()[1] == str(os.getpid())]

def wait(done, total):
    print(*children(), flush=True)
    sys.stdin.read()

dataset._BLOCK_BYTES, dataset.worker_count = 2000, lambda size: 3
with stop_at_once():
    try:
        dataset.prepare(source_of(Path(sys.argv[1]), Path(sys.argv[3])), Path(sys.argv[2]), wait)
    except StopRequested:
        print("left:", *children(), *Path(sys.argv[2]).iterdir())
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_work(stop: signal.Signals, tmp_path: Path) -> None:
    """Whether the process is asked to stop or is gone from one moment to the next."""
    path = write_rows(tmp_path / "train.jsonl", rows(100))
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "cache"), str(smollm2_folder())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        assert len(pids) == 3
        watched = [os.pidfd_open(int(pid)) for pid in pids]
        process.send_signal(stop)
        for ended in watched:
            assert select.select([ended], [], [], 60)[0]
            os.close(ended)
        output = process.stdout.read()
    assert output == ("" if stop == signal.SIGKILL else "left:\n")


def test_a_worker_imports_no_training_library() -> None:
    """They take longer to import than most files to tokenize."""
    code = "import sys, finetune_trainer.data.block; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "set()\n"


@pytest.mark.parametrize(
    ("mebibytes", "cores", "count"), [(1, 16, 0), (40, 16, 5), (9000, 16, 16), (9000, 4, 4), (9000, 96, 16)]
)
def test_as_many_workers_as_pay_for_themselves(
    mebibytes: int, cores: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "threads_here", lambda: cores)
    assert workers.worker_count(mebibytes << 20) == count
