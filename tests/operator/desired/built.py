"""Jobs as the API server holds them, and what is built of them."""

from __future__ import annotations

from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.load import load_manifest
from finetune_operator.desired import job_config_map, pytorch_job
from finetune_operator.settings import OperatorSettings
from tests.api.jobs import manifest

UID = "7dd8f03f-1111-2222-3333-444444444444"
SETTINGS = OperatorSettings(
    default_output_uri="s3://models/team-a", progress_url="https://finetune-operator.finetune-system.svc:8443"
)


def stored(labels: dict[str, str] | None = None, name: str = "guard", uid: str = UID, **spec: Any) -> FineTuneJob:
    """A job with namespace and uid; keywords are keys of its spec."""
    raw = manifest(**{"train_path": "s3://data/train.jsonl", **spec})
    raw["metadata"] = {"name": name, "namespace": "team-a", "uid": uid, "labels": labels or {}}
    result = load_manifest(raw)
    assert result.job is not None, [str(problem) for problem in result.errors]
    return result.job


def pytorch(job: FineTuneJob, settings: OperatorSettings = SETTINGS, attempt: int = 1) -> dict[str, Any]:
    """Its PyTorchJob."""
    return pytorch_job(job, attempt, settings)


def pod(job: FineTuneJob, settings: OperatorSettings = SETTINGS, attempt: int = 1) -> dict[str, Any]:
    """The pod spec of its workers."""
    worker = pytorch(job, settings, attempt)["spec"]["pytorchReplicaSpecs"]["Worker"]
    spec: dict[str, Any] = worker["template"]["spec"]
    return spec


def container(job: FineTuneJob, settings: OperatorSettings = SETTINGS, attempt: int = 1) -> dict[str, Any]:
    """The container of its workers."""
    (found,) = pod(job, settings, attempt)["containers"]
    return dict(found)


def environment(job: FineTuneJob, settings: OperatorSettings = SETTINGS, attempt: int = 1) -> dict[str, Any]:
    """Variable -> its value, or where it comes from."""
    variables = container(job, settings, attempt)["env"]
    found = {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in variables}
    assert len(found) == len(variables)
    return found


def config_map(job: FineTuneJob, settings: OperatorSettings = SETTINGS, attempt: int = 1) -> dict[str, Any]:
    """Its ConfigMap."""
    return job_config_map(job, attempt, settings)
