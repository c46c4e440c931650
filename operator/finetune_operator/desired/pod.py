"""The pod of one worker, within the restricted Pod Security Standard whatever the job asks for."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from finetune_api.job import FineTuneJob
from finetune_api.workers import Workers
from finetune_operator.desired.environment import MASTER_PORT, TERMINATION_MESSAGE_PATH, environment
from finetune_operator.desired.metadata import child_labels
from finetune_operator.desired.volumes import JOB_FOLDER, pod_volumes
from finetune_operator.names import APP_NAME_LABEL, EVICT_ANNOTATION, JOB_FILE_KEY, PYTORCH_CONTAINER, TRAINER_APP
from finetune_operator.settings import OperatorSettings

PORT_NAME = "pytorchjob-port"
"""The training operator's name for the port of its services."""


def pod_template(job: FineTuneJob, attempt: int, settings: OperatorSettings) -> dict[str, Any]:
    """The template of the workers' pods.

    Args:
        job: result of `attempt_job`.
        attempt: number of the attempt, from 1.
        settings: the operator's.
    """
    workers = job.spec.workers
    volumes = pod_volumes(job, attempt, settings)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": workers.service_account_name or "default",
        "automountServiceAccountToken": False,
        # Variables for every service of the namespace could hide those that the trainer reads.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.termination_grace_seconds,
        "securityContext": _pod_security(settings),
        **_placement(workers),
        "containers": [_container(job, attempt, settings, volumes.mounts)],
        "volumes": volumes.volumes,
    }
    return {
        "metadata": {
            "labels": {APP_NAME_LABEL: TRAINER_APP, **child_labels(job, attempt)},
            "annotations": {EVICT_ANNOTATION: "false"},
        },
        "spec": spec,
    }


def _container(
    job: FineTuneJob, attempt: int, settings: OperatorSettings, mounts: list[dict[str, Any]]
) -> dict[str, Any]:
    workers = job.spec.workers
    return {
        "name": PYTORCH_CONTAINER,
        "image": workers.image,
        **({"imagePullPolicy": workers.image_pull_policy} if workers.image_pull_policy else {}),
        "command": ["python", "-m", "finetune_trainer", f"{JOB_FOLDER}/{JOB_FILE_KEY}"],
        "env": environment(job, attempt, settings),
        # With what the schema would fill in, so that the object that is stored is the one that was made.
        "ports": [{"name": PORT_NAME, "containerPort": MASTER_PORT, "protocol": "TCP"}],
        **_resources(workers),
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


def _resources(workers: Workers) -> dict[str, Any]:
    asked = _plain(workers.resources) if workers.resources else {}
    gpus = {workers.gpu_resource_name: str(workers.gpus_per_node)} if workers.gpus_per_node else {}
    quantities = {kind: {**asked.get(kind, {}), **gpus} for kind in ("limits", "requests")}
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


def _placement(workers: Workers) -> dict[str, Any]:
    chosen = {
        "imagePullSecrets": [_plain(secret) for secret in workers.image_pull_secrets],
        "nodeSelector": dict(workers.node_selector),
        "tolerations": [_plain(toleration) for toleration in workers.tolerations],
        "affinity": workers.affinity,
        "priorityClassName": workers.priority_class_name,
        "runtimeClassName": workers.runtime_class_name,
    }
    return {key: value for key, value in chosen.items() if value}


def _plain(model: BaseModel) -> dict[str, Any]:
    """A part of the job in Kubernetes' spelling."""
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)
