"""A FineTuneJob on the stage: what the tests do to it and look at, in words of their own.

A scenario is a list of steps: apply, let something happen to the pods, wait for what status says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.outcome import (
    AdapterResult,
    CheckpointResult,
    DatasetResult,
    MetricsResult,
    Reason,
    TerminationMessage,
)
from finetune_api.verification import VerificationMessage
from finetune_operator.names import child_name, pod_name, verification_name
from tests.cluster.api import WAIT_SECONDS, Api, Object, condition_of, wait_until
from tests.cluster.kubelet import Kubelet

ADAPTER = AdapterResult(
    uri="s3://models/team-a/adapter", base_model="acme/model", sha256="0" * 64, size_bytes=4_900_000
)

SPEC: Mapping[str, Any] = {
    "model_id": "meta-llama/Meta-Llama-3-8B-Instruct",
    "train_path": "s3://data/train.jsonl",
    "task": "instruction_tuning",
    "lora_config": {"r": 8},
    # All memory set aside: a kill for want of it is the job's own then.
    "workers": {"nodes": 1, "gpusPerNode": 0, "resources": {"limits": {"memory": "1Gi"}}},
}


def manifest(name: str, **spec: Any) -> Object:
    """A FineTuneJob; keywords are keys of its spec, on top of SPEC. None takes one away."""
    merged = {**SPEC, **spec}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {key: value for key, value in merged.items() if value is not None},
    }


def success(adapter: AdapterResult = ADAPTER, *, step: int = 10) -> str:
    """The last words of rank 0 after success."""
    return said(
        TerminationMessage(
            succeeded=True,
            message=f"The adapter is at {adapter.uri}.",
            rank=0,
            adapter=adapter,
            dataset=DatasetResult(rows=100, trainable_tokens=4000),
            metrics=MetricsResult(train_loss=0.5, eval_loss=0.4),
            checkpoint=CheckpointResult(uri="s3://models/team-a/checkpoints/step-00000010", step=step),
        )
    )


def failure(reason: Reason, message: str = "It did not work: change something.", **more: Any) -> str:
    """The last words of a rank that failed."""
    return said(TerminationMessage(succeeded=False, reason=reason, message=message, **more))


def verdict(verified: bool | None, message: str = "Ten of ten golden conversations agree.") -> str:
    """The last words of a verification."""
    return VerificationMessage(verified=verified, message=message).to_bytes().decode()


def said(message: TerminationMessage) -> str:
    """As it stands in the termination message file."""
    return message.to_bytes().decode()


@dataclass(frozen=True)
class Scene:
    """One job in its namespace."""

    api: Api
    kubelet: Kubelet
    name: str

    def apply(self, **spec: Any) -> Object:
        """Create the job."""
        return self.api.create(manifest(self.name, **spec))

    def change(self, **spec: Any) -> Object:
        """Change keys of its spec."""
        return self.api.patch("FineTuneJob", self.name, {"spec": spec})

    def job(self) -> Object:
        """The job as it is."""
        return self.api.get("FineTuneJob", self.name)

    def status(self) -> Object:
        """Its status."""
        found: Object = self.job().get("status") or {}
        return found

    def child(self, attempt: int = 1) -> str:
        """Name of the PyTorchJob and ConfigMap of an attempt."""
        return child_name(self.name, self.job()["metadata"]["uid"], attempt)

    def pod(self, attempt: int = 1, worker: int = 0) -> str:
        """Name of one worker's pod."""
        return pod_name(self.child(attempt), worker)

    def pods(self, attempt: int = 1, count: int = 1) -> list[Object]:
        """The pods of an attempt, once they are all there."""
        return self.kubelet.pods(self.child(attempt), count)

    def verification(self) -> str:
        """Name of the Job that verifies the adapter."""
        return verification_name(self.name, self.job()["metadata"]["uid"])

    def verifying_pod(self) -> Object:
        """The pod of that Job which has not ended, once it is there."""

        def look() -> list[Object]:
            found = self.api.list("Pod", labels=f"batch.kubernetes.io/job-name={self.verification()}")
            return [pod for pod in found if not _is_over(pod)]

        (pod,) = wait_until(look, lambda pods: len(pods) == 1)
        return pod

    def wait_verified(self, state: str, reason: str, says: str = "", timeout_seconds: float = WAIT_SECONDS) -> Object:
        """Status once its condition Verified is that."""

        def holds(status: Object) -> bool:
            found = self.condition(status, "Verified")
            return (found["status"], found["reason"]) == (state, reason) and says in found["message"]

        return self._wait(holds, timeout_seconds)

    def run(self, attempt: int = 1, count: int = 1) -> list[Object]:
        """Let all pods of an attempt run."""
        pods = self.pods(attempt, count)
        for pod in pods:
            self.kubelet.run(pod)
        self.wait_phase("Running", "Preparing")
        return pods

    def wait_phase(self, *phases: str, timeout_seconds: float = WAIT_SECONDS) -> Object:
        """Status once its phase is one of those."""
        return self._wait(lambda status: status.get("phase") in phases, timeout_seconds)

    def wait_reason(self, reason: str, timeout_seconds: float = WAIT_SECONDS) -> str:
        """The message of the condition Succeeded, once it has that reason."""
        status = self._wait(lambda status: self.condition(status)["reason"] == reason, timeout_seconds)
        message: str = self.condition(status)["message"]
        return message

    def wait_reason_and_rest(self, reason: str, timeout_seconds: float = WAIT_SECONDS) -> Object:
        """Status once it has that reason and nothing is under way any more."""
        return self._wait(
            lambda status: (
                self.condition(status)["reason"] == reason and self.condition(status, "Reconciling")["status"] is None
            ),
            timeout_seconds,
        )

    def wait_attempts(self, *reasons: str, timeout_seconds: float = WAIT_SECONDS) -> Object:
        """Status once attempts have ended with these reasons, in their order."""
        return self._wait(
            lambda status: [attempt["reason"] for attempt in status.get("attempts", [])] == list(reasons),
            timeout_seconds,
        )

    def condition(self, status: Object, kind: str = "Succeeded") -> Object:
        """A condition of a status; one without reason when it is not there."""
        return condition_of({"status": status}, kind) or {"reason": None, "message": "", "status": None}

    def events(self) -> list[tuple[str, str]]:
        """Type and reason of the events about the job, oldest first."""
        uid = self.job()["metadata"]["uid"]
        events = [event for event in self.api.list("Event") if event["involvedObject"].get("uid") == uid]
        ordered = sorted(events, key=lambda event: int(event["metadata"]["resourceVersion"]))
        return [(event["type"], event["reason"]) for event in ordered]

    def wait_events(self, count: int) -> list[tuple[str, str]]:
        """Type and reason of the events about the job, once there are so many: they come after the status."""
        return wait_until(self.events, lambda events: len(events) >= count)

    def pytorch_jobs(self) -> list[Object]:
        """All PyTorchJobs of the namespace."""
        return self.api.list("PyTorchJob")

    def effective(self, attempt: int = 1) -> str:
        """The effective job of an attempt."""
        text: str = self.api.get("ConfigMap", self.child(attempt))["data"]["job.yaml"]
        return text

    def _wait(self, condition: Any, timeout_seconds: float) -> Object:
        found = self.api.wait("FineTuneJob", self.name, lambda job: condition(job.get("status") or {}), timeout_seconds)
        status: Object = found["status"]
        return status


def _is_over(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"] or pod["status"].get("phase") in ("Succeeded", "Failed")


def as_json(value: Any) -> str:
    """For comparing."""
    return json.dumps(value, sort_keys=True)
