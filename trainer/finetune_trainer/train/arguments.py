"""The job in transformers' words."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from finetune_api.job import FineTuneJobSpec
from finetune_api.outcome import Reason
from finetune_api.training import Logger
from finetune_trainer.errors import JobError
from finetune_trainer.train.collective import TIMEOUT
from finetune_trainer.train.plan import TrainingPlan

LOGGED_STEPS = 200
"""About so many steps of a run are logged; short runs log every one."""


def training_arguments(
    spec: FineTuneJobSpec, plan: TrainingPlan, *, name: str, folder: Path, device: torch.device, sharded: bool
) -> TrainingArguments:
    """transformers' arguments for a job.

    Args:
        spec: the effective job.
        plan: gives the number of steps; to the Trainer the whole run is one epoch.
        name: of the run, for experiment trackers.
        folder: scratch folder; nothing of value is written there.
        device: what this process trains on.
        sharded: FSDP2 instead of DDP.
    """
    gpu = device.type == "cuda"
    checkpointing = bool(choose_checkpointing(spec.gradient_checkpointing, sharded=sharded))
    sharding: dict[str, Any] = {}
    if sharded:
        # FSDP2 recomputes activations itself; transformers' own way would gather the weights once more.
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "activation_checkpointing": checkpointing}
        sharding, checkpointing = {"fsdp": True, "fsdp_config": config}, False
    return TrainingArguments(
        output_dir=str(folder),
        run_name=name,
        max_steps=plan.total_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch",
        seed=spec.seed,
        bf16=gpu,
        use_cpu=not gpu,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        eval_on_start=spec.eval_first and spec.valid_path is not None,
        logging_strategy="steps",
        logging_steps=max(1, plan.total_steps // LOGGED_STEPS),
        logging_first_step=True,
        # A loss that is not a number must be seen, not replaced by an older one.
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[spec.logger.provider] if spec.logger else [],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=False,
        # They never change, and ranks run different numbers of batches.
        ddp_broadcast_buffers=False,
        ddp_timeout=int(TIMEOUT.total_seconds()),
        **sharding,
    )


_TRACKER_SETTINGS = {
    "wandb": {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "base_url": "WANDB_BASE_URL", "mode": "WANDB_MODE"},
    "mlflow": {"tracking_uri": "MLFLOW_TRACKING_URI", "experiment_name": "MLFLOW_EXPERIMENT_NAME"},
}
"""Keys of logger.provider_config that are acted on, with the variable that tells the tracker."""


def set_up_tracker(logger: Logger | None, environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Hand the job's logger settings to the tracker's own variables.

    Returns:
        Warnings about settings that have no effect.

    Raises:
        JobError: InvalidSpec, the tracker's package is not installed.
    """
    if logger is None:
        return []
    if importlib.util.find_spec(logger.provider) is None:
        raise JobError(
            Reason.INVALID_SPEC,
            f"logger.provider is {logger.provider}, whose Python package is not installed: use a trainer image with it "
            "(pip install finetune-operator[loggers]) or remove logger.",
        )
    known = _TRACKER_SETTINGS[logger.provider]
    for key, variable in known.items():
        if key in logger.provider_config:
            environ.setdefault(variable, str(logger.provider_config[key]))
    # MLflow makes a missing experiment by itself, as LLMForge's switch asks.
    unknown = sorted(set(logger.provider_config) - set(known) - {"create_experiment_if_not_exists"})
    return [f"logger.provider_config.{key} has no effect." for key in unknown]


def sharding_notice(asked: str, *, device: torch.device, world_size: int) -> list[str]:
    """Why `sharding: fsdp` has no effect here, if it has none."""
    if asked != "fsdp" or (world_size > 1 and device.type == "cuda"):
        return []
    where = "on CPU" if device.type != "cuda" else "in one process"
    return [f"sharding: fsdp has no effect {where}: the model is held whole."]


def choose_checkpointing(asked: bool | None, *, sharded: bool) -> bool | None:
    """Whether activations are checkpointed; None where the trainer decides it, which knows the memory."""
    return True if asked is None and sharded else asked


def choose_sharding(asked: str, *, device: torch.device, world_size: int, base_bytes: int) -> bool:
    """Whether the model is sharded (FSDP2) instead of held whole by each process (DDP).

    Only GPUs share a model: accelerate wraps nothing on CPU. `auto` shards when the frozen weights alone take more than
    60 % of a GPU's memory; the rest is for activations, LoRA and optimizer.
    """
    if world_size == 1 or asked == "ddp" or device.type != "cuda":
        return False
    if asked == "fsdp":
        return True
    return base_bytes > 0.6 * torch.cuda.get_device_properties(device).total_memory
