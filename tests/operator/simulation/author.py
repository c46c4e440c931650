"""What people do: to FineTuneJobs as their authors, and to what belongs to the operator as they should not."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from finetune_api.outcome import Metric, TrainerStatus
from finetune_operator.names import JOB_UID_LABEL, KUEUE_QUEUE_LABEL
from finetune_operator.policy.times import rfc3339
from finetune_operator.wire import Raw
from tests.operator.simulation.clients import Client

NAME = "guard"
SPEC: Raw = {
    "model_id": "meta-llama/Meta-Llama-3-8B-Instruct",
    "train_path": "s3://data/train.jsonl",
    "task": "instruction_tuning",
    "lora_config": {"r": 8},
    "backoffLimit": 1,
    "workers": {"nodes": 1, "gpusPerNode": 0},
}
FINALIZER = "example.com/wait"


def manifest(name: str = NAME, *, queue: str | None = None, **spec: Any) -> Raw:
    """A FineTuneJob; keywords are keys of its spec, None takes one away."""
    labels = {KUEUE_QUEUE_LABEL: queue} if queue else {}
    merged = {key: value for key, value in {**SPEC, **spec}.items() if value is not None}
    return {"metadata": {"name": name, "labels": labels}, "spec": merged}


def relabel(client: Client, raw: Raw) -> None:
    """Take away the label by which our watches find an object."""
    client.patch(raw, {"metadata": {"labels": {JOB_UID_LABEL: None}}})


def orphan(client: Client, raw: Raw) -> None:
    """Take away an object's owner."""
    client.patch(raw, {"metadata": {"ownerReferences": None}})


def report(phase: str, step: int, now: datetime) -> TrainerStatus:
    """A trainer's, sent just now."""
    metrics = {"phase": phase, "current_step": str(step)}
    named = [Metric(name=name, value=value) for name, value in metrics.items()]
    return TrainerStatus(progress_percentage=step, metrics=named, last_updated_time=rfc3339(now))


def foreign(name: str) -> Raw:
    """An object of somebody else's."""
    return {"metadata": {"name": name}, "spec": {"runPolicy": {}, "pytorchReplicaSpecs": {"Worker": {"replicas": 0}}}}
