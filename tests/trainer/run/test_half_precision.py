"""Frozen weights in bfloat16 and adapters in float32, as on GPUs: whole runs, in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.forked_job import ForkedJob, run_to_end
from tests.trainer.run.half_precision import BROKEN_RANK
from tests.trainer.run.tiny_job import TinyJob

WORKER = "tests.trainer.run.half_precision"


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """The run in float32."""
    return run_to_end(tmp_path_factory.mktemp("exact"), processes=1).job


def run_half(folder: Path, *, processes: int, **more: Any) -> ForkedJob:
    return run_to_end(folder, processes=processes, worker=WORKER, train_batch_size_per_device=4 // processes, **more)


@pytest.mark.parametrize(("processes", "sharding"), [(1, "auto"), (2, "auto"), (2, "fsdp")])
def test_a_run_in_half_precision_is_that_in_float32_but_for_rounding(
    tmp_path: Path, exact: TinyJob, processes: int, sharding: str
) -> None:
    found = run_half(tmp_path / "half", processes=processes, sharding=sharding)
    assert "Rows lie in packs" in found.log()
    # Losses of 10 and more: in bfloat16 they would be multiples of 1/16.
    assert found.job.losses() == pytest.approx(exact.losses(), rel=2e-3)
    assert any(loss * 16 % 1 for loss in found.job.losses().values())
    adapter = load_file(found.job.output / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_a_kernel_that_fails_in_one_process_means_padding_in_all(tmp_path: Path, exact: TinyJob) -> None:
    found = run_half(tmp_path / "half", processes=2, environ={BROKEN_RANK: "1"})
    assert "For this model rows are padded: packs fail in another process" in found.log()
    assert found.job.losses() == pytest.approx(exact.losses(), rel=2e-3)
