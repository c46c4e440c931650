"""A run that is killed and started again ends where it would have ended: same losses, same adapter.

FAULTS=all tries more numbers of processes; `tests/trainer/faults` tries every phase of a run.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.outcome import EXIT_CODES, Reason
from tests.trainer.forked_job import ForkedJob, run_to_end
from tests.trainer.run.launched_job import LaunchedJob
from tests.trainer.run.tiny_job import TinyJob

# Dropout, so that random states matter; long enough to be interrupted twice.
LONG: dict[str, Any] = {
    "num_epochs": 12,
    "lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "checkpoint_and_evaluation_frequency": {"strategy": "steps", "value": 5},
    "num_checkpoints_to_keep": 2,
}


FULL = os.environ.get("FAULTS") == "all"


@pytest.mark.parametrize(("processes", "sharding"), [(2, "fsdp"), *([(1, "auto"), (2, "auto")] if FULL else [])])
def test_a_run_killed_and_then_stopped_ends_like_one_left_alone(tmp_path: Path, processes: int, sharding: str) -> None:
    spec: dict[str, Any] = {"train_batch_size_per_device": 4 // processes, "sharding": sharding, **LONG}
    undisturbed = run_to_end(tmp_path / "undisturbed", processes=processes, **spec)

    job = TinyJob(tmp_path / "disturbed", **spec)
    killed = LaunchedJob(job, processes=processes)
    killed.wait_for_checkpoint(10)
    killed.kill()
    at_kill = max(job.losses())
    assert at_kill < 72
    assert not (job.output / "adapter").exists()

    stopped = LaunchedJob(job, processes=processes)
    stopped.wait_for_checkpoint(at_kill + 10)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.end() == EXIT_CODES[Reason.TERMINATED], stopped.log()
    assert "Resuming from" in stopped.log()
    message = stopped.message()
    assert message.reason is Reason.TERMINATED
    assert message.checkpoint is not None
    assert message.checkpoint.step == max(job.losses())
    assert (Path(message.checkpoint.uri) / "manifest.json").exists()

    resumed = ForkedJob(job, processes=processes)
    assert resumed.end() == 0, resumed.log()
    assert job.losses() == pytest.approx(undisturbed.job.losses(), abs=1e-5)
    assert job.eval_losses()[72] == pytest.approx(undisturbed.job.eval_losses()[72], abs=1e-5)
    expected = load_file(undisturbed.job.output / "adapter" / "adapter_model.safetensors")
    found = load_file(job.output / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize(
    ("processes", "spec"),
    [
        (2, {}),
        (2, {"sharding": "fsdp", "gradient_checkpointing": True}),
        *([(4, {}), (4, {"sharding": "fsdp"}), (2, {"sharding": "fsdp", "padding": "max_length"})] if FULL else []),
    ],
)
def test_several_processes_make_the_same_adapter_as_one(tmp_path: Path, processes: int, spec: dict[str, Any]) -> None:
    """24 rows in steps of 20: the last step of an epoch has 4 rows, so uneven shares are part of it."""
    common = {key: value for key, value in spec.items() if key == "padding"} | {"num_epochs": 6, "context_length": 96}
    one = run_to_end(tmp_path / "one", processes=1, train_batch_size_per_device=20, **common)
    several = run_to_end(
        tmp_path / "several", processes=processes, train_batch_size_per_device=20 // processes, **common | spec
    )
    assert several.job.losses() == pytest.approx(one.job.losses(), abs=1e-5)
    assert several.job.eval_losses() == pytest.approx(one.job.eval_losses(), abs=1e-5)
    messages = [run.message() for run in (one, several)]
    assert all(messages)
    best = [message.checkpoint for message in messages if message]
    assert len({checkpoint.step for checkpoint in best if checkpoint}) == 1
    expected, found = (load_file(run.job.output / "adapter" / "adapter_model.safetensors") for run in (one, several))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_a_rank_without_rows_in_a_step_does_not_hang_the_others(tmp_path: Path) -> None:
    """25 rows in steps of 2 x 4: one row is left for the last step, which one of two processes has."""
    from tests.trainer.run.tiny_job import rows, write_rows

    folder = tmp_path / "job"
    folder.mkdir()
    write_rows(folder / "train.jsonl", rows(25))
    write_rows(folder / "valid.jsonl", rows(1))
    job = run_to_end(folder, processes=2, num_epochs=1, train_batch_size_per_device=4).job
    assert max(job.losses()) == 4
    assert job.eval_losses()
