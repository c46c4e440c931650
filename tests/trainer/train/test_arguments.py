"""The job in transformers' words: nothing is lost in translation, nothing is ignored in silence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.outcome import Reason
from finetune_api.training import Logger
from finetune_trainer.errors import JobError
from finetune_trainer.train.arguments import choose_sharding, set_up_tracker, sharding_notice, training_arguments
from finetune_trainer.train.plan import TrainingPlan
from tests.trainer.run.tiny_job import TinyJob

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
PLAN = TrainingPlan(rows=24, rows_per_step=4, epochs=2, seed=42)


def translated(tmp_path: Path, **spec: Any) -> Any:
    job = TinyJob(tmp_path, **spec).job()
    return training_arguments(job.spec, PLAN, name="tiny", folder=tmp_path, device=CPU, sharded=False)


@pytest.mark.parametrize(
    ("spec", "name", "value"),
    [
        ({"learning_rate": 3e-4}, "learning_rate", 3e-4),
        ({"weight_decay": 0.1}, "weight_decay", 0.1),
        ({"max_grad_norm": 0.5}, "max_grad_norm", 0.5),
        ({"seed": 5}, "seed", 5),
        ({}, "activation_checkpointing", False),
        ({"gradient_checkpointing": True}, "activation_checkpointing", True),
        ({"no_gradient_checkpoint": False}, "activation_checkpointing", True),
        ({"eval_first": True}, "eval_on_start", True),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", 1),
        ({}, "max_steps", 12),
        ({}, "logging_nan_inf_filter", False),
        ({}, "report_to", []),
        ({"logger": {"provider": "wandb"}}, "report_to", ["wandb"]),
    ],
)
def test_a_key_of_the_job_reaches_the_trainer(tmp_path: Path, spec: dict[str, Any], name: str, value: object) -> None:
    assert getattr(translated(tmp_path, **spec), name) == value


def test_a_sharded_model_uses_fsdp2_and_its_own_activation_checkpointing(tmp_path: Path) -> None:
    spec = TinyJob(tmp_path, gradient_checkpointing=True).job().spec
    found = training_arguments(spec, PLAN, name="tiny", folder=tmp_path, device=CPU, sharded=True)
    assert isinstance(found.fsdp_config, dict)
    assert found.fsdp_config["version"] == 2
    assert found.fsdp_config["activation_checkpointing"] is True
    assert not found.activation_checkpointing


@pytest.mark.parametrize(
    ("asked", "device", "world_size", "base_gib", "sharded"),
    [
        ("auto", CPU, 2, 100, False),
        ("fsdp", CPU, 2, 1, False),
        ("auto", GPU, 1, 100, False),
        ("auto", GPU, 8, 10, False),
        ("auto", GPU, 8, 60, True),
        ("fsdp", GPU, 8, 1, True),
        ("ddp", GPU, 8, 100, False),
    ],
)
def test_a_model_is_sharded_when_asked_or_when_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    device: torch.device,
    world_size: int,
    base_gib: int,
    sharded: bool,
) -> None:
    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    found = choose_sharding(asked, device=device, world_size=world_size, base_bytes=base_gib * 2**30)
    assert found is sharded


@pytest.mark.parametrize(
    ("asked", "device", "world_size", "notices"),
    [("fsdp", CPU, 2, 1), ("fsdp", GPU, 1, 1), ("fsdp", GPU, 2, 0), ("auto", CPU, 2, 0), ("ddp", CPU, 2, 0)],
)
def test_sharding_that_has_no_effect_is_said(asked: str, device: torch.device, world_size: int, notices: int) -> None:
    assert len(sharding_notice(asked, device=device, world_size=world_size)) == notices


def test_logger_settings_reach_the_tracker_and_others_are_named() -> None:
    environ: dict[str, str] = {"WANDB_ENTITY": "mine"}
    logger = Logger(provider="wandb", provider_config={"project": "guards", "entity": "theirs", "colour": "blue"})
    assert set_up_tracker(logger, environ) == ["logger.provider_config.colour has no effect."]
    assert environ == {"WANDB_PROJECT": "guards", "WANDB_ENTITY": "mine"}


def test_a_logger_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(JobError, match="mlflow, whose Python package is not installed") as caught:
        set_up_tracker(Logger(provider="mlflow"), {})
    assert caught.value.reason is Reason.INVALID_SPEC


def test_mlflow_receives_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        # Set and removed by the run itself; monkeypatch puts back what was there.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    # The small package that the trainer comes with keeps runs in files or sends them to a server, no database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = f"file://{tmp_path}/mlruns"
    config = {"tracking_uri": address, "experiment_name": "guards", "create_experiment_if_not_exists": True}
    job = TinyJob(tmp_path, logger={"provider": "mlflow", "provider_config": config}, num_epochs=1)
    assert job.run().succeeded
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("guards")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert logged == pytest.approx(job.losses())
