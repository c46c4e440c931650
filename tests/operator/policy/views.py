"""Attempts as they were read, in as few words as a test needs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.outcome import AdapterResult, CheckpointResult, Reason, TerminationMessage
from finetune_api.status import FineTuneJobStatus
from finetune_operator.policy.observed import PodView, PyTorchJobView
from finetune_operator.policy.plan import DesiredState, ObservedState, Timeouts

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
WORKERS_UID = "workers-uid"
ADAPTER = AdapterResult(uri="s3://models/adapter", base_model="acme/model", sha256="0" * 64, size_bytes=1)
PATIENCE = Timeouts(
    retry_base_seconds=10,
    retry_limit_seconds=360,
    group_end_seconds=30,
    pods_expected_seconds=30,
    verification_seconds=7200,
)


def later(seconds: float) -> datetime:
    """So many seconds after NOW."""
    return NOW + timedelta(seconds=seconds)


def pytorch_job(attempt: int = 1, nodes: int = 1, **more: Any) -> PyTorchJobView:
    """The PyTorchJob of an attempt, an hour old."""
    made: dict[str, Any] = {"created_at": later(-3600), **more}
    return PyTorchJobView(name=f"guard-{attempt}", uid=WORKERS_UID, attempt=attempt, nodes=nodes, **made)


def pod(index: int = 0, **more: Any) -> PodView:
    """A pod that was made and not started."""
    made: dict[str, Any] = {"phase": "Pending", "created_at": later(-3600), "memory_limit": "64Gi", **more}
    return PodView(index=index, name=f"guard-1-worker-{index}", uid=f"pod-{index}", owner_uid=WORKERS_UID, **made)


def running(index: int = 0, **more: Any) -> PodView:
    """A pod that runs."""
    return pod(index, phase="Running", running=True, **more)


def ended(
    index: int = 0, code: int | None = 0, words: TerminationMessage | None = None, *, ago: float = 0, **more: Any
) -> PodView:
    """A pod whose trainer ended so many seconds ago."""
    phase = "Succeeded" if code == 0 else "Failed"
    made: dict[str, Any] = {"phase": phase, "ended_at": later(-ago), **more}
    return pod(index, ended=True, exit_code=code, last_words=words, **made)


def success(**more: Any) -> TerminationMessage:
    """Rank 0's last words."""
    return TerminationMessage(succeeded=True, adapter=ADAPTER, rank=0, **more)


def failure(reason: Reason, message: str = "Change something.", **more: Any) -> TerminationMessage:
    """A failed rank's last words."""
    return TerminationMessage(succeeded=False, reason=reason, message=message, **more)


def checkpoint(step: int) -> CheckpointResult:
    """A checkpoint of that step."""
    return CheckpointResult(uri=f"s3://models/step-{step}", step=step)


def desired(**more: Any) -> DesiredState:
    """A spec without anything special."""
    plain: dict[str, Any] = {
        "generation": 1,
        "suspend": False,
        "backoff_limit": 3,
        "active_deadline_seconds": None,
        "ttl_seconds_after_finished": None,
        "queue": None,
    }
    return DesiredState(**(plain | more))


def observed(
    status: FineTuneJobStatus | None = None,
    found: PyTorchJobView | None = None,
    pods: Sequence[PodView] = (),
    **spec: Any,
) -> ObservedState:
    """What was read of a job; keywords are of its spec."""
    return ObservedState(desired=desired(**spec), status=status or FineTuneJobStatus(), pytorch_job=found, pods=pods)
