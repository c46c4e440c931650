"""Lives of jobs that play themselves, many at once: whoever looks at a job does what comes next, whatever happened.

A test interrupts them, lets them go on and compares how they ended, and what was created and deleted on the way, with
a life that nobody interrupted.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_api.outcome import Reason
from finetune_operator.names import ATTEMPT_LABEL, JOB_NAME_LABEL
from tests.cluster.api import Api, ApiError, Object, has_condition, wait_until
from tests.cluster.fault_proxy import FaultProxy
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, failure, success, verdict

LIFE_SECONDS = 120
TICK_SECONDS = 0.2
AT_WORK = ("Preparing", "Running")
CHILDREN = ("configmaps", "jobs", "pytorchjobs")
VERIFICATION = ""
"""Key of the pod that verifies, which belongs to no attempt."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


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

    def is_over(self, job: Object | None) -> bool:
        """Whether nothing more will happen to the job but the releasing of its attempt."""
        if "ttlSecondsAfterFinished" in self.spec:
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


STORIES: Mapping[str, Story] = {
    "happy": Story(_happy),
    "retry": Story(_retry),
    "suspend and resume": Story(_suspend),
    "verification": Story(_verified, {"output": {"uri": "s3://models/team-a", "verify": True}}),
    "ttl": Story(_user_error, {"ttlSecondsAfterFinished": 1}),
    "deadline": Story(_hang, {"activeDeadlineSeconds": 3}),
}


class Stage:
    """Where jobs live at the same time, in one namespace."""

    def __init__(self, kubelet: Kubelet, api: Api, proxy: FaultProxy | None = None) -> None:
        self._kubelet, self._api, self._proxy = kubelet, api, proxy

    def begin(self, story: Story, names: Sequence[str]) -> list[Scene]:
        """Apply jobs of these names."""
        scenes = [Scene(self._api, self._kubelet, name) for name in names]
        for scene in scenes:
            scene.apply(**story.spec)
        return scenes

    def play(
        self,
        story: Story,
        scenes: Sequence[Scene],
        *,
        until: Callable[[str], bool] = lambda _: False,
        seconds: float = LIFE_SECONDS,
    ) -> None:
        """Let the jobs live until each is over, or `until` says of its name that it is interrupted."""

        def going_on() -> list[str]:
            jobs = self._tick(story, scenes, alone=False, left_out=until)
            # A job that is over lets go of its pods.
            held = {pod["metadata"]["labels"][JOB_NAME_LABEL] for pod in self._pods() if not _has_ended(pod)}
            return [n for n, job in jobs.items() if not until(n) and (n in held or not story.is_over(job))]

        deadline = time.monotonic() + seconds
        while names := going_on():
            assert time.monotonic() < deadline, f"Not over within {seconds:.0f} s: {names}"
            time.sleep(TICK_SECONDS)

    def play_alone(self, story: Story, scenes: Sequence[Scene]) -> None:
        """Let the pods go as far as they get with no operator there."""

        names = {scene.name for scene in scenes}

        def look() -> dict[str, str]:
            self._tick(story, scenes, alone=True)
            mine = [pod for pod in self._pods() if pod["metadata"]["labels"][JOB_NAME_LABEL] in names]
            return {pod["metadata"]["name"]: pod["status"].get("phase", "") for pod in mine}

        wait_until(look, lambda phases: "Pending" not in phases.values() and phases == look())

    def _tick(
        self,
        story: Story,
        scenes: Sequence[Scene],
        *,
        alone: bool,
        left_out: Callable[[str], bool] = lambda _: False,
    ) -> dict[str, Object | None]:
        jobs = {job["metadata"]["name"]: job for job in self._api.list("FineTuneJob")}
        pods: dict[str, dict[str, Object]] = {}
        for pod in self._pods():
            labels = pod["metadata"]["labels"]
            pods.setdefault(labels[JOB_NAME_LABEL], {})[labels.get(ATTEMPT_LABEL, VERIFICATION)] = pod
        for scene in scenes:
            job = jobs.get(scene.name)
            if job is not None and not left_out(scene.name) and not story.is_over(job):
                try:
                    story.act(Moment(scene, job, pods.get(scene.name, {}), alone))
                except ApiError as error:
                    if error.code not in (404, 409):  # it has gone or changed since it was listed
                        raise
        return {scene.name: jobs.get(scene.name) for scene in scenes}

    def _pods(self) -> list[Object]:
        return self._api.list("Pod", labels=JOB_NAME_LABEL)

    def ending(self, name: str) -> str:
        """How a job ended: its status without times, and what there is of its attempts; "" while something goes on."""
        job = self._api.find("FineTuneJob", name)
        status = (job or {}).get("status") or {}
        mine = f"{JOB_NAME_LABEL}={name}"
        left = {kind: self._api.list(kind, labels=mine) for kind in ("Pod", "PyTorchJob", "Job", "ConfigMap")}
        if any(left.values()) if job is None else any(not _has_ended(pod) for pod in left["Pod"]):
            return ""
        kept = {key: value for key, value in status.items() if key not in ("activeSeconds", "activeSince")}
        names = {kind: sorted(found["metadata"]["name"] for found in objects) for kind, objects in left.items()}
        return _anonymous(json.dumps({"job": job is not None, "status": kept, "left": names}, indent=1), name)

    def history(self, name: str) -> list[str]:
        """What was created and deleted for a job through the proxy, in the order in which it was done."""
        changes = self._proxy.changes(name) if self._proxy else []
        done = [c for c in changes if c[0] in ("create", "delete") and c[1] in CHILDREN and c[3] in (200, 201)]
        return [_anonymous(f"{verb} {resource} {what}", name) for verb, resource, what, _ in done]


def _has_ended(pod: Object) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed") and "deletionTimestamp" not in pod["metadata"]


def _anonymous(text: str, name: str) -> str:
    text = re.sub(rf"\b{re.escape(name)}-[0-9a-f]{{8}}\b", "job", text)
    # Kubernetes draws the end of the name of a Job's pod.
    return _TIME.sub("(time)", re.sub(r"\bjob-verify-[a-z0-9]{5}\b", "job-verify-(drawn)", text))
