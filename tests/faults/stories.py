"""Lives of jobs that play themselves: whoever looks at a job does what comes next, whatever happened to it meanwhile.

A test interrupts them, lets them go on and compares how they ended, and what was created and deleted on the way, with
a life that nobody interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.outcome import Reason
from tests.cluster.api import Object, has_condition
from tests.cluster.scene import Scene, failure, success, verdict

AT_WORK = ("Preparing", "Running")
VERIFICATION = ""
"""Key of the pod that verifies, which belongs to no attempt."""
FINALIZER = "tests/hold"
PREEMPTED = "tests/preempted"
"""Annotation of a PyTorchJob whose queue has stopped it once."""


@dataclass(frozen=True)
class Moment:
    """One job and its pods as they are now."""

    scene: Scene
    job: Object
    pods: Mapping[str, Object]
    """By the number of their attempt, or VERIFICATION."""
    alone: bool
    """No operator is there whose status one could wait for."""

    @property
    def phase(self) -> str:
        """The job's."""
        return str((self.job.get("status") or {}).get("phase"))

    def is_seen_running(self, attempt: int) -> bool:
        """Whether the attempt's pod runs and status says so. A pod that does not run yet is started."""
        pod = self.pods.get(str(attempt))
        if pod is None or "deletionTimestamp" in pod["metadata"]:
            return False
        if pod["status"].get("phase") == "Pending":
            self.scene.kubelet.run(pod)
        return pod["status"].get("phase") == "Running" and (self.alone or self.phase in AT_WORK)

    def succeed(self, attempt: int) -> None:
        """The attempt's pod publishes the adapter, once it is seen to run."""
        if self.is_seen_running(attempt):
            self.scene.kubelet.succeed(self.pods[str(attempt)], success())


Act = Callable[[Moment], None]


@dataclass(frozen=True)
class Story:
    """A life of a job."""

    act: Act
    """Does what comes next."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    goes: bool = False
    """The job itself is gone in the end."""

    def is_over(self, job: Object | None) -> bool:
        """Whether nothing more will happen to the job but the releasing of its attempt."""
        if self.goes:
            return job is None
        if "output" in self.spec:
            return job is not None and has_condition(job, "Verified")
        return job is not None and (has_condition(job, "Succeeded") or has_condition(job, "Succeeded", "False"))


def _happy(now: Moment) -> None:
    now.succeed(1)


def _retry(now: Moment) -> None:
    if now.is_seen_running(1):
        now.scene.kubelet.fail(now.pods["1"], 201, failure(Reason.HUB_UNAVAILABLE))
    now.succeed(2)


def _suspend(now: Moment) -> None:
    asked = now.job["spec"].get("suspend")
    if asked is None and now.is_seen_running(1) and now.phase in AT_WORK:
        now.scene.change(suspend=True)
    if asked and now.phase == "Suspended" and not has_condition(now.job, "Reconciling"):
        now.scene.change(suspend=False)
    now.succeed(2)


def _user_error(now: Moment) -> None:
    if now.is_seen_running(1):
        now.scene.kubelet.fail(now.pods["1"], 11, failure(Reason.DATA_INVALID))


def _verified(now: Moment) -> None:
    now.succeed(1)
    pod = now.pods.get(VERIFICATION)
    if pod is None or pod["status"].get("phase") in ("Succeeded", "Failed"):
        return
    if pod["status"].get("phase") == "Pending":
        now.scene.kubelet.run(pod)
    elif now.alone or has_condition(now.job, "Verified", "Unknown"):
        now.scene.kubelet.succeed(pod, verdict(True))


def _hang(now: Moment) -> None:
    now.is_seen_running(1)


def _delete(now: Moment) -> None:
    if now.is_seen_running(1):
        now.scene.api.delete("FineTuneJob", now.scene.name)


def _delete_held(now: Moment) -> None:
    api, metadata = now.scene.api, now.job["metadata"]
    if "deletionTimestamp" not in metadata:
        if now.is_seen_running(1):
            api.patch("FineTuneJob", now.scene.name, {"metadata": {"finalizers": [FINALIZER]}})
            api.delete("FineTuneJob", now.scene.name)
    elif api.find("PyTorchJob", now.scene.child()) is None:
        api.patch("FineTuneJob", now.scene.name, {"metadata": {"finalizers": None}})


def _preempt(now: Moment) -> None:
    api, name = now.scene.api, now.scene.child()
    pytorch_job = api.find("PyTorchJob", name)
    if pytorch_job is None:
        return
    stopped = pytorch_job["spec"]["runPolicy"].get("suspend")
    if PREEMPTED in (pytorch_job["metadata"].get("annotations") or {}):
        if not stopped:
            now.succeed(1)
        elif has_condition(pytorch_job, "Suspended") and not now.pods and (now.alone or now.phase == "Queued"):
            api.patch("PyTorchJob", name, {"spec": {"runPolicy": {"suspend": False}}})
    elif now.is_seen_running(1):
        marked = {"annotations": {PREEMPTED: "true"}}
        api.patch("PyTorchJob", name, {"metadata": marked, "spec": {"runPolicy": {"suspend": True}}})


def _second_try(now: Moment) -> None:
    if now.is_seen_running(1):
        now.scene.api.delete("PyTorchJob", now.scene.child(1))
    now.succeed(2)


STORIES: Mapping[str, Story] = {
    "happy": Story(_happy),
    "retry": Story(_retry),
    "suspend and resume": Story(_suspend),
    "verification": Story(_verified, {"output": {"uri": "s3://models/team-a", "verify": True}}),
    "ttl": Story(_user_error, {"ttlSecondsAfterFinished": 1}, goes=True),
    "deadline": Story(_hang, {"activeDeadlineSeconds": 3}),
    "deletion": Story(_delete, goes=True),
    "deletion held up": Story(_delete_held, goes=True),
    "preemption by a queue": Story(_preempt),
    "workers deleted": Story(_second_try),
}
