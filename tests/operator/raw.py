"""Objects as the API server shows them, in as few words as a test needs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.policy.times import rfc3339
from finetune_operator.queue import Key

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
KEY = Key("team", "guard")
UID = "job-uid"
CHILD = "guard-job-uid-1"


def job(status: dict[str, Any] | None = None, version: str = "7", **spec: Any) -> dict[str, Any]:
    """A FineTuneJob; keywords are of its spec."""
    metadata = {"namespace": "team", "name": "guard", "uid": UID, "resourceVersion": version, "generation": 1}
    kind = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob"}
    return {**kind, "metadata": metadata, "spec": spec, "status": status or {}}


def finished(ago: float = 0, generation: int = 1, verified: str = "") -> dict[str, Any]:
    """Status of a job that has ended so many seconds ago; `verified` is the reason of that condition."""
    time = rfc3339(NOW - timedelta(seconds=ago))
    conditions = [{"type": "Succeeded", "status": "True", "reason": "Succeeded", "lastTransitionTime": time}]
    if verified:
        conditions.append({"type": "Verified", "status": "Unknown", "reason": verified, "lastTransitionTime": time})
    return {
        "phase": "Succeeded",
        "attempt": 1,
        "observedGeneration": generation,
        "completionTime": time,
        "conditions": conditions,
    }


def child(name: str = CHILD, version: str = "1", attempt: str = "1", **more: Any) -> dict[str, Any]:
    """A PyTorchJob or pod of the job's; keywords are its spec and status."""
    labels = {"finetune.dev/job-name": "guard", "finetune.dev/job-uid": UID, "finetune.dev/attempt": attempt}
    metadata = {
        "namespace": "team",
        "name": name,
        "uid": f"uid-of-{name}",
        "resourceVersion": version,
        "labels": labels,
    }
    return {"metadata": {**metadata, "ownerReferences": [{"uid": UID, "controller": True}], "generation": 1}, **more}


def pytorch_job(version: str = "1", attempt: str = "1", name: str = CHILD, **status: Any) -> dict[str, Any]:
    """A PyTorchJob of one worker; keywords are its status."""
    spec = {"pytorchReplicaSpecs": {"Worker": {"replicas": 1}}}
    return child(name, version, attempt, spec=spec, status=status)


def pod(version: str = "1", phase: str = "Running", **status: Any) -> dict[str, Any]:
    """The only worker's pod; keywords are its status."""
    return controlled(child(f"{CHILD}-worker-0", version, status={"phase": phase, **status}))


def controlled(raw: dict[str, Any], name: str = CHILD, kind: str = "PyTorchJob") -> dict[str, Any]:
    """The same, made by the PyTorchJob, or the Job, of that name."""
    version = {"PyTorchJob": "kubeflow.org/v1", "Job": "batch/v1"}[kind]
    owner = {"apiVersion": version, "kind": kind, "name": name, "uid": f"uid-of-{name}", "controller": True}
    raw["metadata"]["ownerReferences"] = [owner]
    return raw
