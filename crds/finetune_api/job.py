"""FineTuneJob: the one resource of this project, as users write it and as every part of it reads it.

The spec is cut by fate: what to train (`training.py`, LLMForge's keys) cannot change once applied, where it runs
(`workers.py`) and how it lives (here) can. Shape is checked here; what keys mean together is checked in `rules.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.fields import Count, KubernetesModel, SpecModel
from finetune_api.generation import GenerationConfig
from finetune_api.llmforge_keys import Refused, WithoutEffect
from finetune_api.lora import LoraConfig
from finetune_api.status import FineTuneJobStatus
from finetune_api.training import Logger, WhatToTrain
from finetune_api.untyped import FlatObject
from finetune_api.workers import Output, Secrets, Workers

__all__ = [
    "API_VERSION",
    "KIND",
    "FineTuneJob",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
    "GenerationConfig",
    "Logger",
    "LoraConfig",
    "Metadata",
    "Output",
    "Secrets",
    "Workers",
]

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
KIND: Literal["FineTuneJob"] = "FineTuneJob"
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_LIMIT = 63


ServerKept = Any
"""Of metadata, where only the server says what may stand. It takes managedFields of any depth: nobody walks them."""


class WhereItRuns(SpecModel):
    """Machines and credentials: may change while the job is suspended or waits."""

    num_devices: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="num_devices is LLMForge's total number of GPUs. workers.nodes x workers.gpusPerNode says the "
        "same and more; given both, they must agree. Default: from workers.",
    )
    worker_resources: FlatObject | None = Field(
        default=None,
        description="worker_resources is LLMForge's choice of machines: accelerator_type:NAME or "
        "anyscale/accelerator_shape:NxNAME becomes the node selector that the operator has for NAME, if it has one. "
        "Keys other than these have no effect. Default: any machine.",
    )
    workers: Workers = Field(
        default_factory=Workers,
        description="workers are the machines and the container of the job. Default: one node with one GPU. The "
        "operator accepts a change only while the job is suspended or waits.",
    )
    secrets: Secrets = Field(
        default_factory=Secrets,
        description="secrets names the Secrets that hold credentials; a spec never contains them. The operator "
        "accepts a change only while the job is suspended or waits. Default: the operator's, if it has any.",
    )


class HowItLives(SpecModel):
    """Life cycle: may change at any time."""

    suspend: bool = Field(
        default=False,
        description="suspend stops the job's pods after a checkpoint and starts it again from there when it becomes "
        "false. Default: false.",
    )
    backoff_limit: int = Field(
        default=3,
        ge=0,
        le=1000,
        alias="backoffLimit",
        description="backoffLimit is how many failed attempts are repeated, 0 to 1000. Failures that are the job's own "
        "(bad data, a missing model) are not repeated; suspension and preemption do not count. Default: 3.",
    )
    active_deadline_seconds: Count | None = Field(
        default=None,
        alias="activeDeadlineSeconds",
        description="activeDeadlineSeconds is how long the job may be active over all attempts, in seconds; time "
        "spent suspended does not count. Default: no limit.",
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None,
        alias="ttlSecondsAfterFinished",
        description="ttlSecondsAfterFinished is how long the finished FineTuneJob is kept, in seconds; the adapter "
        "stays. Default: for ever.",
    )


class Published(SpecModel):
    """Where the results go. Immutable, as what to train."""

    output: Output | None = Field(
        default=None,
        description="output is where adapter, checkpoints and report are written. Default: the operator's own, or "
        "--output-dir of `finetune run`.",
    )


class FineTuneJobSpec(HowItLives, WhereItRuns, Published, Refused, WithoutEffect, WhatToTrain):
    """Everything a user writes."""


class Metadata(KubernetesModel):
    """Kubernetes' ObjectMeta; what is not used here is let through as it is."""

    name: Annotated[str, Field(min_length=1, max_length=NAME_LIMIT, pattern=NAME_PATTERN)] = Field(
        description="name of the job: a lowercase DNS label that starts with a letter, at most 63 characters."
    )
    namespace: Annotated[str, Field(max_length=63)] | None = Field(default=None, description="namespace of the job.")
    uid: Annotated[str, Field(max_length=128)] | None = Field(default=None, description="uid, given by the server.")
    generation: int | None = Field(default=None, description="generation of the spec, given by the server.")
    resource_version: str | None = Field(default=None, description="resourceVersion, given by the server.")
    creation_timestamp: str | None = Field(default=None, description="creationTimestamp, given by the server.")
    deletion_timestamp: str | None = Field(default=None, description="deletionTimestamp, given by the server.")
    deletion_grace_period_seconds: int | None = Field(
        default=None, description="deletionGracePeriodSeconds, given by the server."
    )
    generate_name: str | None = Field(default=None, description="generateName is the prefix of a name to be drawn.")
    labels: dict[str, str] = Field(default_factory=dict, description="labels of the job.")
    annotations: dict[str, str] = Field(default_factory=dict, description="annotations of the job.")
    finalizers: list[str] | None = Field(default=None, description="finalizers of the job.")
    owner_references: ServerKept | None = Field(default=None, description="ownerReferences of the job.")
    managed_fields: ServerKept | None = Field(default=None, description="managedFields, kept by the server.")
    self_link: str | None = Field(default=None, description="selfLink, no longer used by Kubernetes.")


class FineTuneJob(KubernetesModel):
    """Fine-tunes a Hugging Face causal language model with LoRA."""

    api_version: Literal["finetune.dev/v1alpha1"] = Field(
        default=API_VERSION, description="apiVersion is finetune.dev/v1alpha1."
    )
    kind: Literal["FineTuneJob"] = Field(default=KIND, description="kind is FineTuneJob.")
    metadata: Metadata = Field(description="metadata is Kubernetes' ObjectMeta.")
    spec: FineTuneJobSpec = Field(description="spec is what to train, where it runs and how it lives.")
    status: FineTuneJobStatus | None = Field(default=None, description="status is written by the operator.")
