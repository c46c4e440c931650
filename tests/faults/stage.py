"""Where many jobs live at the same time, in one namespace: what is played there, and how each of them ended."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from finetune_operator.names import ATTEMPT_LABEL, JOB_NAME_LABEL
from tests.cluster.api import Api, ApiError, Object, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene
from tests.faults.fault_table import ALL_FAULTS
from tests.faults.history import History
from tests.faults.stories import VERIFICATION, Moment, Story

LIFE_SECONDS = 1800 if ALL_FAULTS else 240
"""Within which all jobs that live at the same time have to come to their ends: a safety net."""
TICK_SECONDS = 0.2
ENDING_SECONDS = 60
LEFT = ("Pod", "PyTorchJob", "Job", "ConfigMap")
"""What there may be of a job."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NotHere = Callable[[str], bool]


class Stage:
    """The jobs of one namespace."""

    def __init__(self, kubelet: Kubelet, api: Api, history: History) -> None:
        self._kubelet, self._api, self._history = kubelet, api, history

    def begin(self, story: Story, names: Sequence[str]) -> list[Scene]:
        """Apply jobs of these names."""
        scenes = [Scene(self._api, self._kubelet, name) for name in names]
        for scene in scenes:
            scene.apply(**story.spec)
        return scenes

    def play(
        self,
        *casts: tuple[Story, Sequence[Scene]],
        until: NotHere = lambda _: False,
        seconds: float = LIFE_SECONDS,
    ) -> None:
        """Let the jobs live until each is over, or `until` says of its name that it has come far enough."""

        def going_on() -> list[str]:
            jobs, pods = self._tick(casts, alone=False, left_out=until)
            # A job that is over lets go of its pods.
            held = {name for name, mine in pods.items() if not all(map(_has_ended, mine.values()))}
            return [
                scene.name
                for story, scenes in casts
                for scene in scenes
                if not until(scene.name) and (scene.name in held or not story.is_over(jobs.get(scene.name)))
            ]

        deadline = time.monotonic() + seconds
        while names := going_on():
            assert time.monotonic() < deadline, f"Not over within {seconds:.0f} s: {names}"
            time.sleep(TICK_SECONDS)

    def play_alone(self, *casts: tuple[Story, Sequence[Scene]]) -> None:
        """Let the pods go as far as they get with no operator there."""

        def look() -> dict[str, str]:
            jobs, pods = self._tick(casts, alone=True)
            going = [s.name for story, scenes in casts for s in scenes if not story.is_over(jobs.get(s.name))]
            mine = [pod for name in going for pod in pods.get(name, {}).values()]
            return {pod["metadata"]["name"]: pod["status"].get("phase", "") for pod in mine}

        wait_until(look, lambda phases: "Pending" not in phases.values() and phases == look(), LIFE_SECONDS)

    def phase(self, name: str) -> str:
        """Of a job, "" before it has one."""
        job = self._api.find("FineTuneJob", name) or {}
        return str((job.get("status") or {}).get("phase", ""))

    def endings(self) -> dict[str, str]:
        """How each job ended: its status without times, and what there is of its attempts; "" while something goes on.

        A job that is gone is there as long as something of it is left.
        """
        jobs = {job["metadata"]["name"]: job for job in self._api.list("FineTuneJob")}
        left: dict[str, dict[str, list[Object]]] = {name: {} for name in jobs}
        for kind in LEFT:
            for found in self._api.list(kind, labels=JOB_NAME_LABEL):
                of_job = left.setdefault(found["metadata"]["labels"][JOB_NAME_LABEL], {})
                of_job.setdefault(kind, []).append(found)
        return {name: _ending(name, jobs.get(name), mine) for name, mine in left.items()}

    def ending(self, name: str) -> str:
        """How one job ended; "" while something goes on."""
        return self.endings().get(name, _ending(name, None, {}))

    def wait_endings(self, names: Sequence[str], expected: str) -> dict[str, str]:
        """How jobs ended: as expected, as soon as that is so of all, else as it is after a while."""

        def look() -> dict[str, str]:
            found = self.endings()
            return {name: found.get(name, _ending(name, None, {})) for name in names}

        with suppress(AssertionError):
            return wait_until(look, lambda seen: set(seen.values()) == {expected}, ENDING_SECONDS)
        return look()

    def history(self, name: str) -> list[str]:
        """What was created and deleted for a job, as the API server tells it."""
        return [_anonymous(line, name) for line in self._history.of(name)]

    def left(self, name: str) -> list[str]:
        """What was created for a job and is not deleted."""
        return self._history.left(name)

    def created(self, name: str, kind: str = "PyTorchJob") -> list[str]:
        """Names of what was created for a job, in that order, as the API server tells it."""
        return self._history.created(name, kind)

    def _tick(
        self, casts: Sequence[tuple[Story, Sequence[Scene]]], *, alone: bool, left_out: NotHere = lambda _: False
    ) -> tuple[dict[str, Object], dict[str, dict[str, Object]]]:
        """What comes next for every job; the jobs and their pods, as they were before."""
        jobs = {job["metadata"]["name"]: job for job in self._api.list("FineTuneJob")}
        pods: dict[str, dict[str, Object]] = {}
        for pod in self._pods():
            labels = pod["metadata"]["labels"]
            pods.setdefault(labels[JOB_NAME_LABEL], {})[labels.get(ATTEMPT_LABEL, VERIFICATION)] = pod
        for story, scene in ((story, scene) for story, scenes in casts for scene in scenes):
            job = jobs.get(scene.name)
            if job is not None and not left_out(scene.name) and not story.is_over(job):
                try:
                    story.act(Moment(scene, job, pods.get(scene.name, {}), alone))
                except ApiError as error:
                    if error.code not in (404, 409):  # it has gone or changed since it was listed
                        raise
        return jobs, pods

    def _pods(self) -> list[Object]:
        return self._api.list("Pod", labels=JOB_NAME_LABEL)


def _has_ended(pod: Object) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed") and "deletionTimestamp" not in pod["metadata"]


def _ending(name: str, job: Object | None, left: Mapping[str, Sequence[Object]]) -> str:
    if any(left.values()) if job is None else any(not _has_ended(pod) for pod in left.get("Pod", ())):
        return ""
    status = (job or {}).get("status") or {}
    kept = {key: value for key, value in status.items() if key not in ("activeSeconds", "activeSince")}
    names = {kind: sorted(found["metadata"]["name"] for found in left.get(kind, ())) for kind in LEFT}
    return _anonymous(json.dumps({"job": job is not None, "status": kept, "left": names}, indent=1), name)


def _anonymous(text: str, name: str) -> str:
    text = re.sub(rf"\b{re.escape(name)}-[0-9a-f]{{8}}\b", "job", text)
    text = re.sub(rf"\bFineTuneJob {re.escape(name)}\b", "FineTuneJob job", text)
    # Kubernetes draws the end of the name of a Job's pod.
    return _TIME.sub("(time)", re.sub(r"\bjob-verify-[a-z0-9]{5}\b", "job-verify-(drawn)", text))
