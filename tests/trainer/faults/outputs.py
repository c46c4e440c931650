"""What a job left: whether all of it is whole, and whether it is what a run without a fault would have left."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.errors import JobError
from finetune_trainer.storage.manifest import MANIFEST_NAME, parse_manifest, verify_tree
from tests.trainer.forked_job import ForkedJob
from tests.trainer.run.tiny_job import TinyJob

SPEC: dict[str, Any] = {
    "lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "checkpoint_and_evaluation_frequency": {"strategy": "steps", "value": 4},
    "num_checkpoints_to_keep": 1,
}
"""Dropout, so that random states matter; 12 steps in all, and a checkpoint goes at the next one."""


def tiny_job(folder: Path, *, processes: int, merged: bool = False, **spec: Any) -> TinyJob:
    """The job to which a fault happens; the same steps with any number of processes."""
    job = TinyJob(folder, train_batch_size_per_device=4 // processes, **(SPEC | spec))
    if merged:
        job.spec["output"] |= {"merged": True}
    return job


@functools.cache
def undisturbed(processes: int, *, merged: bool = False, validated: bool = True, dropout: float = 0.1) -> TinyJob:
    """The same job, to which nothing happened; run once per session."""
    folder = Path(tempfile.mkdtemp(prefix="undisturbed-"))
    spec: dict[str, Any] = {} if validated else {"valid_path": None}
    spec["lora_config"] = SPEC["lora_config"] | {"lora_dropout": dropout}
    job = tiny_job(folder, processes=processes, merged=merged, **spec)
    attempt = ForkedJob(job, processes=processes)
    assert attempt.end() == 0, attempt.log()
    return job


def check_whole(output: Path) -> None:
    """Every folder with a manifest has what the manifest lists, even while somebody writes."""
    # Unlike rglob it takes no offence at folders that go while it walks.
    for file in [Path(folder) / MANIFEST_NAME for folder, _, names in os.walk(output) if MANIFEST_NAME in names]:
        content = b""
        try:
            content = file.read_bytes()
            verify_tree(file.parent, parse_manifest(content, str(file)), str(file.parent))
        except FileNotFoundError:
            continue
        except JobError:
            # Removed or replaced meanwhile: then its manifest was the first to go.
            if file.exists() and file.read_bytes() == content:
                raise


def check_equal(job: TinyJob, expected: TinyJob) -> None:
    """The same losses and the same adapter, whole, and the same checkpoints."""
    check_whole(job.output)
    assert _checkpoint_folders(job) == _checkpoint_folders(expected)
    assert (job.output / "adapter" / MANIFEST_NAME).exists()
    assert job.losses() == pytest.approx(expected.losses(), abs=1e-5)
    assert job.eval_losses() == pytest.approx(expected.eval_losses(), abs=1e-5)
    check_tensors(job.output / "adapter", expected.output / "adapter")
    merged = expected.output / "merged"
    assert (job.output / "merged" / MANIFEST_NAME).exists() == merged.exists()
    if merged.exists():
        check_tensors(job.output / "merged", merged)


def _checkpoint_folders(job: TinyJob) -> set[str]:
    return {path.name for path in (job.output / "checkpoints").iterdir()}


def check_tensors(folder: Path, expected: Path) -> None:
    """The same tensors under the same names."""
    files = sorted(path.name for path in expected.glob("*.safetensors"))
    assert files
    assert sorted(path.name for path in folder.glob("*.safetensors")) == files
    for name in files:
        ours, theirs = load_file(folder / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)


def finite_checkpoints(job: TinyJob) -> list[int]:
    """Steps of the complete checkpoints; all their values are numbers."""
    files = sorted((job.output / "checkpoints").glob(f"step-*/{MANIFEST_NAME}"))
    for file in files:
        for tensor in load_file(file.parent / "adapter_model.safetensors").values():
            assert torch.isfinite(tensor).all()
    return [int(file.parent.name.removeprefix("step-")) for file in files]
