"""Tests play the kubelet: they write into a pod's status what a kubelet writes there, and confirm deletions.

Pods are bound to a node that exists as an object only, so that deleting one takes a grace period and somebody who
confirms it, as on a machine. Everything else of a pod's life is decided by the test.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from tests.cluster.api import WAIT_SECONDS, Api, ApiError, Object, wait_until

NODE = "node-1"
JOB_LABEL = "training.kubeflow.org/job-name"
SIGKILLED, SIGTERMED = 137, 143
REAPER_SECONDS = 0.1
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
_REASONS_OF_PHASES = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}


class Kubelet:
    """What happens to the pods of one namespace. Methods take a pod as an object or by its name, and return it."""

    def __init__(self, api: Api, reaper: Reaper) -> None:
        self._api = api
        self._reaper = reaper

    def pods(self, pytorchjob: str, count: int, timeout_seconds: float = WAIT_SECONDS) -> list[Object]:
        """Wait until a PyTorchJob has that many pods, without those that are being deleted; worker 0 comes first."""

        def look() -> list[Object]:
            found = self._api.list("Pod", labels=f"{JOB_LABEL}={pytorchjob}")
            return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

        found = wait_until(look, lambda pods: len(pods) == count, timeout_seconds)
        return sorted(found, key=lambda pod: (len(pod["metadata"]["name"]), pod["metadata"]["name"]))

    def unschedulable(self, pod: Object | str, text: str) -> Object:
        """No node has room; as the scheduler says it."""
        condition = _condition("PodScheduled", "False", "Unschedulable", text)
        return self._write(pod, {"phase": "Pending"}, condition)

    def scheduled(self, pod: Object | str) -> Object:
        """On the node, its containers not started yet."""
        pod = self._bound(pod)
        waiting = {"state": {"waiting": {"reason": "ContainerCreating"}}, "ready": False}
        return self._write(pod, {"phase": "Pending", **_containers(pod, waiting)})

    def pull_fails(self, pod: Object | str, image: str) -> Object:
        """The image cannot be pulled."""
        return self._waits(pod, "ImagePullBackOff", f'Back-off pulling image "{image}"')

    def config_error(self, pod: Object | str, text: str) -> Object:
        """The container cannot be made of what its environment names, e.g. a missing Secret."""
        return self._waits(pod, "CreateContainerConfigError", text)

    def run(self, pod: Object | str) -> Object:
        """All containers run."""
        pod = self._bound(pod)
        running = {"state": {"running": {"startedAt": _now()}}, "ready": True, "started": True}
        return self._write(pod, {"phase": "Running", **_containers(pod, running)}, _condition("Ready", "True"))

    def succeed(self, pod: Object | str, message: str = "") -> Object:
        """All containers ended with 0; `message` is the termination message."""
        return self._end(pod, "Succeeded", 0, "Completed", message)

    def fail(self, pod: Object | str, exit_code: int, message: str = "", reason: str = "Error") -> Object:
        """All containers ended with an exit code; `message` is the termination message."""
        return self._end(pod, "Failed", exit_code, reason, message)

    def oom_kill(self, pod: Object | str) -> Object:
        """The container went over its memory limit."""
        return self.fail(pod, SIGKILLED, reason="OOMKilled")

    def evict(self, pod: Object | str, text: str = "The node was low on resource: ephemeral-storage.") -> Object:
        """The node took the pod off, for want of a resource."""
        disrupted = _condition("DisruptionTarget", "True", "TerminationByKubelet", text)
        status = {"reason": "Evicted", "message": text}
        return self._end(pod, "Failed", SIGKILLED, "Error", "", status, disrupted)

    def evict_for_limit(self, pod: Object | str, volume: str = "finetune-cache", limit: str = "10Gi") -> Object:
        """The pod wrote more than it may; for that a kubelet sets no condition."""
        text = f'Usage of EmptyDir volume "{volume}" exceeds the limit "{limit}". '
        return self._end(pod, "Failed", SIGKILLED, "Error", "", {"reason": "Evicted", "message": text})

    def preempt(self, pod: Object | str) -> None:
        """The scheduler takes the pod away for a more important one: it is marked, then deleted."""
        text = "default-scheduler: preempting to accommodate a higher priority pod"
        disrupted = _condition("DisruptionTarget", "True", "PreemptionByScheduler", text)
        self._write(pod, {}, disrupted)
        self._api.delete("Pod", _name(pod))

    def terminate(self, pod: Object | str, exit_code: int = SIGTERMED) -> None:
        """End what still runs and remove the pod, as a kubelet does once its deletion was asked for."""
        if isinstance(pod, str):
            pod = self._api.get("Pod", pod)
        terminate(self._api, pod, exit_code)

    @contextmanager
    def holding_deletions(self) -> Iterator[None]:
        """While this lasts nobody confirms deletions: pods that are deleted stay, unless `terminate` removes them."""
        with self._reaper.paused():
            yield

    def _waits(self, pod: Object | str, reason: str, message: str) -> Object:
        pod = self._bound(pod)
        state = {"state": {"waiting": {"reason": reason, "message": message}}, "ready": False, "started": False}
        return self._write(pod, {"phase": "Pending", **_containers(pod, state)})

    def _end(
        self,
        pod: Object | str,
        phase: str,
        exit_code: int,
        reason: str,
        message: str,
        status: Mapping[str, Any] | None = None,
        *conditions: Object,
    ) -> Object:
        pod = self._bound(pod)
        ended = {"phase": phase, **_ended_containers(pod, exit_code, reason, message), **(status or {})}
        return self._write(pod, ended, _condition("Ready", "False", _REASONS_OF_PHASES[phase]), *conditions)

    def _bound(self, pod: Object | str) -> Object:
        pod = self._api.get("Pod", _name(pod))
        if not pod["spec"].get("nodeName"):
            bind(self._api, pod)
            pod = self._api.get("Pod", _name(pod))
        return pod

    def _write(self, pod: Object | str, status: Mapping[str, Any], *conditions: Object) -> Object:
        pod = self._api.get("Pod", _name(pod))
        return write_status(self._api, pod, status, *conditions)


class Reaper:
    """The node, and a thread that confirms the deletion of every pod on it."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._stop = threading.Event()
        self._may_reap = threading.Event()
        self._may_reap.set()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> None:
        """Create the node and begin."""
        self._api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Confirm nothing meanwhile."""
        self._may_reap.clear()
        try:
            yield
        finally:
            self._may_reap.set()

    def _run(self) -> None:
        while not self._stop.wait(REAPER_SECONDS):
            if self._may_reap.is_set():
                # A control plane that a test has stopped comes back.
                with suppress(httpx.TransportError, ApiError):
                    self._reap()

    def _reap(self) -> None:
        on_the_node = {"fieldSelector": f"spec.nodeName={NODE}"}
        # Ten times a second, whole pods would keep everybody busy.
        found = self._api.request("GET", "/api/v1/pods", params=on_the_node, headers={"Accept": METADATA_ONLY})
        for metadata in (pod["metadata"] for pod in found["items"] or []):
            if "deletionTimestamp" in metadata:
                with suppress(ApiError):
                    terminate(self._api, self._api.get("Pod", metadata["name"], metadata["namespace"]))


def bind(api: Api, pod: Object) -> None:
    """Assign a pod to the node."""
    metadata = {"name": pod["metadata"]["name"], "namespace": pod["metadata"]["namespace"]}
    path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/binding"
    target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
    api.request("POST", path, json={"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": target})


def write_status(api: Api, pod: Object, status: Mapping[str, Any], *conditions: Object) -> Object:
    """Merge a status into a pod's; conditions replace those of the same type."""
    replaced = {condition["type"] for condition in conditions}
    kept = [old for old in pod["status"].get("conditions", []) if old["type"] not in replaced]
    body = {**status, "conditions": [*kept, *conditions]}
    return api.patch_status("Pod", pod["metadata"]["name"], body, pod["metadata"]["namespace"])


def terminate(api: Api, pod: Object, exit_code: int = SIGTERMED) -> None:
    """End what still runs of a pod and remove it."""
    if pod["status"].get("phase") not in _REASONS_OF_PHASES and pod["spec"].get("nodeName"):
        # A kubelet brings a pod to an end before it lets go of it; controllers count on it.
        ended = {"phase": "Failed", **_ended_containers(pod, exit_code, "Error", "")}
        write_status(api, pod, ended, _condition("Ready", "False", "PodFailed"))
    metadata = pod["metadata"]
    # By its uid: the training operator makes new pods under old names.
    api.delete("Pod", metadata["name"], metadata["namespace"], grace_seconds=0, uid=metadata["uid"])


def _name(pod: Object | str) -> str:
    return pod if isinstance(pod, str) else str(pod["metadata"]["name"])


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _condition(condition_type: str, status: str, reason: str | None = None, message: str | None = None) -> Object:
    texts = {"reason": reason, "message": message}
    written = {key: value for key, value in texts.items() if value}
    return {"type": condition_type, "status": status, "lastTransitionTime": _now(), **written}


def _containers(pod: Object, state: Mapping[str, Any]) -> Object:
    """The same state for every container; init containers have completed."""
    completed = {"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}, "ready": True}
    return {
        "hostIP": "10.0.0.1",
        "startTime": pod["status"].get("startTime") or _now(),
        "initContainerStatuses": [_status(part, completed) for part in pod["spec"].get("initContainers", [])],
        "containerStatuses": [_status(part, state) for part in pod["spec"]["containers"]],
    }


def _status(container: Object, state: Mapping[str, Any]) -> Object:
    return {"name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0, **state}


def _ended_containers(pod: Object, exit_code: int, reason: str, message: str) -> Object:
    started = pod["status"].get("startTime") or _now()
    terminated = {"exitCode": exit_code, "reason": reason, "startedAt": started, "finishedAt": _now()}
    if message:
        terminated["message"] = message
    return _containers(pod, {"state": {"terminated": terminated}, "ready": False, "started": False})
