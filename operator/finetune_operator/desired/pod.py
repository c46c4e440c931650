"""The pods of a job, within the restricted Pod Security Standard whatever the job asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.workers import Workers
from finetune_operator.desired.environment import (
    MASTER_PORT,
    TERMINATION_MESSAGE_PATH,
    environment,
    verification_environment,
)
from finetune_operator.desired.metadata import child_labels, job_labels
from finetune_operator.desired.scheduling import placement_of
from finetune_operator.desired.spelling import plain
from finetune_operator.desired.volumes import JOB_FOLDER, PodVolumes, pod_volumes, verification_volumes
from finetune_operator.names import (
    APP_NAME_LABEL,
    EVICT_ANNOTATION,
    JOB_FILE_KEY,
    PYTORCH_CONTAINER,
    TRAINER_APP,
    VERIFICATION_CONTAINER,
)
from finetune_operator.settings import OperatorSettings

PORT_NAME = "pytorchjob-port"
"""The training operator's name for the port of its services."""


def pod_template(
    job: FineTuneJob, attempt: int, settings: OperatorSettings, avoid: Sequence[str] = ()
) -> dict[str, Any]:
    """The template of the workers' pods.

    Args:
        job: result of `effective_job`.
        attempt: number of the attempt, from 1.
        settings: the operator's.
        avoid: names of nodes that others are preferred to.
    """
    volumes = pod_volumes(job, attempt, settings)
    container = {
        "name": PYTORCH_CONTAINER,
        "command": ["python", "-m", "finetune_trainer", f"{JOB_FOLDER}/{JOB_FILE_KEY}"],
        "env": environment(job, attempt, settings),
        # With what the schema would fill in, so that the object that is stored is the one that was made.
        "ports": [{"name": PORT_NAME, "containerPort": MASTER_PORT, "protocol": "TCP"}],
        **_resources(job.spec.workers, job.spec.workers.gpus_per_node),
    }
    return _template(job, child_labels(job, attempt), container, volumes, settings, avoid)


def verification_template(
    job: FineTuneJob, attempt: int, address: str, settings: OperatorSettings, avoid: Sequence[str] = ()
) -> dict[str, Any]:
    """The template of the pod that verifies the adapter.

    Args:
        job: result of `effective_job`.
        attempt: number of the attempt whose ConfigMap the job is read from.
        address: the adapter's.
        settings: the operator's.
        avoid: names of nodes that others are preferred to.
    """
    workers = job.spec.workers
    container = {
        "name": VERIFICATION_CONTAINER,
        "command": [
            *("python", "-m", "finetune_trainer.verify"),
            *("--job", f"{JOB_FOLDER}/{JOB_FILE_KEY}"),
            # What looks like a variable would be replaced by it, also behind a dollar that is its own.
            *("--adapter", address.replace("$", "$$")),
        ],
        "env": verification_environment(job, settings),
        # One answers the few prompts that there are; main memory has to hold what it held in training.
        **_resources(workers, min(workers.gpus_per_node, 1)),
    }
    return _template(job, job_labels(job), container, verification_volumes(job, attempt, settings), settings, avoid)


def _template(
    job: FineTuneJob,
    labels: dict[str, str],
    container: dict[str, Any],
    volumes: PodVolumes,
    settings: OperatorSettings,
    avoid: Sequence[str],
) -> dict[str, Any]:
    workers = job.spec.workers
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": workers.service_account_name or "default",
        "automountServiceAccountToken": False,
        # Variables for every service of the namespace could hide those that the trainer reads.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.termination_grace_seconds,
        "securityContext": _pod_security(settings),
        **placement_of(workers, avoid),
        "containers": [_container(container, workers, volumes.mounts)],
        "volumes": volumes.volumes,
    }
    return {
        "metadata": {
            "labels": {APP_NAME_LABEL: TRAINER_APP, **labels},
            "annotations": {EVICT_ANNOTATION: "false"},
        },
        "spec": spec,
    }


def _container(own: dict[str, Any], workers: Workers, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    """A container with what is `own` to it."""
    return {
        **own,
        "image": workers.image,
        **({"imagePullPolicy": workers.image_pull_policy} if workers.image_pull_policy else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePath": TERMINATION_MESSAGE_PATH,
        # The log's tail could quote a secret, and status is read by more people than logs are.
        "terminationMessagePolicy": "File",
        "volumeMounts": mounts,
    }


def _resources(workers: Workers, gpus: int) -> dict[str, Any]:
    asked = plain(workers.resources) if workers.resources else {}
    counted = {workers.gpu_resource_name: str(gpus)} if gpus else {}
    quantities = {kind: {**asked.get(kind, {}), **counted} for kind in ("limits", "requests")}
    found = {kind: amounts for kind, amounts in quantities.items() if amounts}
    return {"resources": found} if found else {}


def _pod_security(settings: OperatorSettings) -> dict[str, Any]:
    security: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    user = settings.pod_user_id
    if user is not None:
        # OnRootMismatch: a claim with many files is not walked through at every start.
        security |= {
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "fsGroupChangePolicy": "OnRootMismatch",
        }
    return security
