"""The training operator and the kubelets, as far as one notices them: each does one thing when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from enum import Enum
from typing import Any

from finetune_api.outcome import AdapterResult, CheckpointResult, Reason, TerminationMessage
from finetune_operator.names import PYTORCH_CONTAINER, REPLICA_INDEX_LABEL, WORKER_REPLICA, pod_name
from finetune_operator.policy.times import rfc3339
from finetune_operator.wire import Raw
from tests.operator.simulation.clients import Client, is_going, owner_uid
from tests.operator.simulation.rules import OVER

ADAPTER = AdapterResult(uri="s3://models/adapter", base_model="acme/model", sha256="0" * 64, size_bytes=1)


class End(Enum):
    """How a worker ends."""

    ADAPTER = "it says where its adapter is"
    NOTHING = "exit code 0, without a word"
    USER_ERROR = "it says what its author has to change"
    WORLD_ERROR = "it says what may be over soon"
    ECHO = "it says that another worker is gone"
    CRASH = "a segmentation fault, without a word"
    EVICTED = "its node took it off"
    TOLD_TO = "it saves a checkpoint, since it was told to end"


_ENDS: dict[End, tuple[int, TerminationMessage | None]] = {
    End.ADAPTER: (0, TerminationMessage(succeeded=True, adapter=ADAPTER, rank=0)),
    End.NOTHING: (0, None),
    End.USER_ERROR: (11, TerminationMessage(succeeded=False, reason=Reason.DATA_INVALID, message="Row 7.")),
    End.WORLD_ERROR: (201, TerminationMessage(succeeded=False, reason=Reason.HUB_UNAVAILABLE, message="Later.")),
    End.ECHO: (203, TerminationMessage(succeeded=False, reason=Reason.PEER_FAILED, message="Gone.", collateral=True)),
    End.CRASH: (139, None),
    End.EVICTED: (137, None),
    End.TOLD_TO: (143, TerminationMessage(succeeded=False, reason=Reason.TERMINATED, message="Told to end.")),
}


class TrainingOperator:
    """Kubeflow's: makes the pods of PyTorchJobs, and says what became of them."""

    def __init__(self, client: Client, now: Callable[[], datetime]) -> None:
        self._client, self._now = client, now

    def work(self) -> None:
        """Do what there is to be done about every PyTorchJob."""
        for raw in self._client.find("pytorchjobs"):
            if not is_going(raw):
                self._work_on(raw)

    def _work_on(self, raw: Raw) -> None:
        status = dict(raw.get("status") or {})
        conditions = {item["type"]: item for item in status.get("conditions", ())}
        pods = {pod["metadata"]["name"]: pod for pod in self._pods(raw)}

        def condition(kind: str, value: str = "True") -> None:
            if conditions.get(kind, {}).get("status") != value:
                time = rfc3339(self._now())
                conditions[kind] = {"type": kind, "status": value, "reason": kind, "lastTransitionTime": time}

        def true(kind: str) -> bool:
            return bool(conditions.get(kind, {}).get("status") == "True")

        condition("Created")
        if not (true("Failed") or true("Succeeded")):
            if raw["spec"]["runPolicy"].get("suspend"):
                for pod in pods.values():
                    self._client.delete(pod)
                condition("Suspended")
                if "Running" in conditions:
                    condition("Running", "False")
            else:
                if true("Suspended"):
                    condition("Suspended", "False")
                    status.pop("startTime", None)
                status.setdefault("startTime", rfc3339(self._now()))
                self._make_pods(raw, pods)
                phases = [pod["status"]["phase"] for pod in pods.values()]
                killed = any(is_going(pod) and pod["status"]["phase"] == "Running" for pod in pods.values())
                if "Running" in phases:
                    condition("Running")
                if "Failed" in phases or killed:
                    condition("Failed")
                    status["completionTime"] = rfc3339(self._now())
                elif phases.count("Succeeded") >= _replicas(raw) > 0:
                    condition("Succeeded")
                    status["completionTime"] = rfc3339(self._now())
        phases = [pod["status"]["phase"] for pod in self._pods(raw)]
        counts = {"succeeded": phases.count("Succeeded"), "failed": phases.count("Failed")}
        status["replicaStatuses"] = {WORKER_REPLICA: {key: count for key, count in counts.items() if count}}
        self._client.set_status(raw, {**status, "conditions": list(conditions.values())})

    def _pods(self, raw: Raw) -> list[Raw]:
        return [pod for pod in self._client.find("pods") if owner_uid(pod) == raw["metadata"]["uid"]]

    def _make_pods(self, raw: Raw, pods: dict[str, Raw]) -> None:
        template = raw["spec"]["pytorchReplicaSpecs"][WORKER_REPLICA].get("template")
        names = ("apiVersion", "kind")
        metadata = raw["metadata"]
        owner = {
            **{key: raw[key] for key in names},
            "name": metadata["name"],
            "uid": metadata["uid"],
            "controller": True,
        }
        for index in range(_replicas(raw)):
            name = pod_name(metadata["name"], index)
            if name not in pods and self._client.get("pods", name) is None:
                labels = {**template["metadata"]["labels"], REPLICA_INDEX_LABEL: str(index)}
                made = {"name": name, "labels": labels, "ownerReferences": [owner]}
                self._client.create("pods", {"metadata": made, "spec": {"containers": [{"name": PYTORCH_CONTAINER}]}})


class Kubelet:
    """A node's: starts pods, writes down how they ended, and lets go of those that are deleted."""

    def __init__(self, client: Client, clock: Callable[[], datetime]) -> None:
        self._client, self._clock = client, clock

    def run(self, pod: Raw) -> None:
        """It is on the node, and its containers run."""
        pod = self._client.patch(pod, {"spec": {"nodeName": "node-1"}})
        self._write(pod, "Running", {"running": {"startedAt": self._time()}})

    def end(self, pod: Raw, how: End) -> None:
        """Its containers have ended."""
        code, words = _ENDS[how]
        if how is End.TOLD_TO and words is not None:
            step = int(pod["metadata"]["resourceVersion"])
            words = words.model_copy(update={"checkpoint": CheckpointResult(uri=f"s3://models/{step}", step=step)})
        ended: dict[str, Any] = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "finishedAt": self._time(),
        }
        if words is not None:
            ended["message"] = words.to_bytes().decode()
        more: dict[str, Any] = {}
        if how is End.EVICTED:
            target = {"type": "DisruptionTarget", "status": "True", "message": "The node was low on memory."}
            more = {"reason": "Evicted", "conditions": [target]}
        pod = self._client.patch(pod, {"spec": {"nodeName": "node-1"}})
        self._write(pod, "Failed" if code else "Succeeded", {"terminated": ended}, **more)

    def confirm(self, pod: Raw, how: End = End.TOLD_TO) -> None:
        """A pod that is being deleted ends, if it has not, and goes."""
        if pod["status"]["phase"] == "Running":
            self.end(pod, how)
        self._client.delete(pod, gracePeriodSeconds=0)

    def _write(self, pod: Raw, phase: str, state: Raw, **more: Any) -> None:
        containers = [{"name": PYTORCH_CONTAINER, "state": state}]
        self._client.set_status(pod, {**pod["status"], "phase": phase, "containerStatuses": containers, **more})

    def _time(self) -> str:
        return rfc3339(self._clock())


def is_over(pod: Raw) -> bool:
    """Whether it has ended."""
    return pod["status"]["phase"] in OVER


def _replicas(raw: Raw) -> int:
    found: int = raw["spec"]["pytorchReplicaSpecs"][WORKER_REPLICA]["replicas"]
    return found
