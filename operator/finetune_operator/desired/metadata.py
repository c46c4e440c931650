"""Names, labels and owner of what the operator creates: the same on every object of an attempt."""

from __future__ import annotations

from typing import Any

from finetune_api.job import API_VERSION, KIND, FineTuneJob
from finetune_operator.names import (
    ATTEMPT_LABEL,
    JOB_NAME_LABEL,
    JOB_UID_LABEL,
    MANAGED_BY_LABEL,
    MANAGER,
    child_name,
    verification_name,
)


def child_of(job: FineTuneJob, attempt: int) -> str:
    """Name of the objects of attempt number `attempt`, from 1."""
    return child_name(job.metadata.name, uid_of(job), attempt)


def child_metadata(job: FineTuneJob, attempt: int) -> dict[str, Any]:
    """Metadata of an object of an attempt."""
    return _metadata(job, child_of(job, attempt), child_labels(job, attempt))


def verification_metadata(job: FineTuneJob) -> dict[str, Any]:
    """Metadata of the Job that verifies the adapter."""
    return _metadata(job, verification_name(job.metadata.name, uid_of(job)), job_labels(job))


def _metadata(job: FineTuneJob, name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Of an object that goes when its FineTuneJob goes."""
    return {
        "name": name,
        "namespace": namespace_of(job),
        "labels": labels,
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": job.metadata.name,
                "uid": uid_of(job),
                # No blockOwnerDeletion: where the API server enforces it, that needs the right to update finalizers.
                "controller": True,
            }
        ],
    }


def child_labels(job: FineTuneJob, attempt: int) -> dict[str, str]:
    """Labels by which an object or a pod of an attempt is found."""
    return {**job_labels(job), ATTEMPT_LABEL: str(attempt)}


def job_labels(job: FineTuneJob) -> dict[str, str]:
    """Labels by which everything is found that belongs to a job."""
    return {MANAGED_BY_LABEL: MANAGER, JOB_NAME_LABEL: job.metadata.name, JOB_UID_LABEL: uid_of(job)}


def uid_of(job: FineTuneJob) -> str:
    """The uid.

    Raises:
        ValueError: the job has none, so it is not one that an API server has stored.
    """
    if not job.metadata.uid:
        raise ValueError(f"FineTuneJob {job.metadata.name} has no uid, so nothing can belong to it.")
    return job.metadata.uid


def namespace_of(job: FineTuneJob) -> str:
    """The namespace.

    Raises:
        ValueError: the job has none.
    """
    if not job.metadata.namespace:
        raise ValueError(f"FineTuneJob {job.metadata.name} has no namespace.")
    return job.metadata.namespace
