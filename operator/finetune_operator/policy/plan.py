"""What was read of a job, and what to do about it: what policies are given, and what they give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_api.problem import Problem
from finetune_api.status import FineTuneJobStatus, Phase, Progress
from finetune_operator.policy.observed import PodView, PyTorchJobView, VerificationView


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """The operator's settings that decide when things happen (seconds)."""

    retry_base_seconds: float
    retry_limit_seconds: float
    group_end_seconds: float
    pods_expected_seconds: float
    verification_seconds: float
    """How long the verification of an adapter may take, and wait for what hinders it."""


@dataclass(frozen=True, kw_only=True)
class DesiredState:
    """What the spec says of how the job lives."""

    generation: int
    suspend: bool
    backoff_limit: int
    active_deadline_seconds: int | None
    ttl_seconds_after_finished: int | None
    queue: str | None
    """Kueue queue, if there is one."""
    verify: bool = False
    """Whether the adapter is to be verified by a Job of its own."""
    problems: Sequence[Problem] = ()
    """Why no attempt can be made of this spec."""
    notices: Sequence[Problem] = ()
    """What its author should know although it will be done."""


@dataclass(frozen=True, kw_only=True)
class ObservedState:
    """What was read of a job. `pytorch_job` and `pods` belong to attempt number `status.attempt`."""

    desired: DesiredState
    status: FineTuneJobStatus
    pytorch_job: PyTorchJobView | None = None
    pods: Sequence[PodView] = ()
    unrecorded: PyTorchJobView | None = None
    """PyTorchJob of the attempt after `status.attempt`, where an operator was stopped before it wrote that down."""
    noticed: datetime | None = None
    """When it was first seen that the current attempt is ending."""
    progress: Progress | None = None
    reported: Phase | None = None
    """Phase in the newest report of the present run of the current attempt."""
    reports_expected: bool = False
    """Whether trainers are told where to report."""
    verification: VerificationView | None = None
    """The Job that verifies the adapter; read while its verdict is awaited."""


@dataclass(kw_only=True)
class Plan:
    """What to do, and what status says once it is done."""

    status: FineTuneJobStatus
    create: int | None = None
    """Number of the attempt to create."""
    leftover_config_map: int | None = None
    """Number of the attempt before that one, where its PyTorchJob may have been deleted by somebody else and its
    ConfigMap be left: delete it."""
    release: bool = False
    """Delete the PyTorchJob of the current attempt and, unless it is the first, its ConfigMap."""
    keep_config_map: bool = False
    """Leave that ConfigMap: the verification reads the job from it."""
    verify: bool = False
    """Create the Job that verifies the adapter."""
    delete_job: bool = False
    again_at: datetime | None = None
    """When to look again although nothing may have happened."""
    ending: bool = False
    """The attempt's end has begun and is not judged yet."""
