"""metrics.jsonl reads as one uninterrupted run and never invents a figure."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.train.metrics_log import MetricsLog, measured, read_metrics

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, steps: range, *, resumed_at_step: int | None = None, loss: float = 1.0) -> None:
    with MetricsLog(path, resumed_at_step=resumed_at_step, now=lambda: NOW) as log:
        for step in steps:
            log.append(step, epoch=step / 10, values={"loss": loss})


def test_a_line_holds_the_step_and_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog(path, resumed_at_step=None, now=lambda: NOW) as log:
        log.append(1, epoch=0.5, values={"loss": 1.5, "eval_samples": 3})
        assert lines(path) == [
            {"step": 1, "epoch": 0.5, "time": "2030-01-02T03:04:05+00:00", "loss": 1.5, "eval_samples": 3}
        ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (float("inf"), None),
        (-float("inf"), None),
        (None, None),
        ("1.5", None),
        (object(), None),
        (torch.tensor([1.0, 2.0]), None),
        (torch.tensor(float("nan")), None),
        (torch.tensor(1.5), 1.5),
        (np.float32(1.5), 1.5),
        (0.0, 0.0),
        (7, 7),
    ],
)
def test_what_was_not_measured_is_null_and_never_zero(tmp_path: Path, value: object, expected: float | None) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, resumed_at_step=None) as log:
        log.append(1, epoch=None, values={"loss": value})
    [line] = lines(path)
    assert line["loss"] == expected
    assert line["epoch"] is None
    assert measured(value) == expected


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(4))
    write(path, range(1, 2))
    assert [line["step"] for line in lines(path)] == [1]


@given(killed_at=st.integers(1, 12), checkpoint=st.integers(0, 12), torn=st.binary(max_size=12))
def test_after_a_resume_every_step_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, killed_at: int, checkpoint: int, torn: bytes
) -> None:
    checkpoint = min(checkpoint, killed_at)
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    write(path, range(1, killed_at + 1), loss=1.0)
    with path.open("ab") as file:
        file.write(torn)
    write(path, range(checkpoint + 1, 15), resumed_at_step=checkpoint, loss=2.0)
    assert [(line["step"], line["loss"]) for line in lines(path)] == [
        (step, 1.0 if step <= checkpoint else 2.0) for step in range(1, 15)
    ]


def test_a_crash_while_the_file_is_rewritten_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    before = path.read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="no space"):
        MetricsLog(path, resumed_at_step=2)
    assert path.read_bytes() == before


def test_lines_that_are_no_entries_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnull\n[1]\n{"loss": 2}\n{"step": "2"}\n\n\xff\n{"step": 3, "lo')
    assert list(read_metrics(path)) == [{"step": 1}]
    assert list(read_metrics(tmp_path / "absent")) == []
