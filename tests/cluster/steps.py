"""Scenarios as tables: something happens to a job or its pods, and then status says so.

A step waits for what it expects and fails with the whole status otherwise. What happens is named by small functions, so
that a scenario reads as a story; those that take `attempt` and `worker` mean the pods of one attempt, from 1 and 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.outcome import CheckpointResult, Reason
from tests.cluster.api import WAIT_SECONDS, Api, Object, has_condition, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, failure, success

Happening = Callable[[Scene], object]
Scenarios = Mapping[str, Sequence["Step"]]


@dataclass(frozen=True)
class Step:
    """Something happens, and then status says so."""

    happens: Happening
    phase: str
    reason: str
    """Of the condition Succeeded."""
    says: str = ""
    """A part of that condition's message."""
    attempts: Sequence[str] | None = None
    """Reasons of the attempts that have ended, oldest first; None: whatever they are."""
    stalled: bool | None = None
    """Whether the condition Stalled is there; None: it is for failed jobs."""
    within_seconds: float = WAIT_SECONDS

    def holds(self, status: Object) -> bool:
        """Whether status says so."""
        conditions = {item["type"]: item for item in status.get("conditions", [])}
        succeeded = conditions.get("Succeeded", {})
        stalled = self.stalled if self.stalled is not None else self.phase == "Failed"
        return (
            (status.get("phase"), succeeded.get("reason")) == (self.phase, self.reason)
            and self.says in succeeded.get("message", "")
            and self.attempts in (None, ended(status))
            and ("Stalled" in conditions) == stalled
        )


def ended(status: Object) -> list[str]:
    """Reasons of the attempts that have ended, oldest first."""
    return [attempt["reason"] for attempt in status.get("attempts", [])]


def play(scene: Scene, steps: Sequence[Step]) -> Object:
    """Go through the steps; the status that the last one led to."""
    status: Object = {}
    for number, step in enumerate(steps, start=1):
        step.happens(scene)
        try:
            status = wait_until(scene.status, step.holds, step.within_seconds)
        except AssertionError as error:
            wanted = f"{step.phase}/{step.reason} {step.says!r} {step.attempts or ''}"
            raise AssertionError(f"Step {number} of {len(steps)} did not lead to {wanted}. {error}") from None
    return status


def play_all(stories: Mapping[str, tuple[Scene, Sequence[Step]]]) -> dict[str, Object]:
    """Go through the steps of several jobs side by side, which takes little longer than one of them.

    Returns:
        The status that each one's last step led to, by the story's name.
    """
    reached: dict[str, Object] = {}
    for number in range(max(len(steps) for _, steps in stories.values())):
        now = {name: (scene, steps[number]) for name, (scene, steps) in stories.items() if number < len(steps)}
        for scene, step in now.values():
            step.happens(scene)
        for name, (scene, step) in now.items():
            try:
                reached[name] = play(scene, [replace(step, happens=nothing)])
            except AssertionError as error:
                raise AssertionError(f"{name!r}, step {number + 1}: {error}") from None
    return reached


def cast(api: Api, kubelet: Kubelet, scenarios: Scenarios) -> dict[str, tuple[Scene, Sequence[Step]]]:
    """A job for each scenario of a table, for `play_all`."""
    return {
        name: (Scene(api, kubelet, f"job-{number}"), steps)
        for number, (name, steps) in enumerate(scenarios.items(), start=1)
    }


def nothing(_: Scene) -> None:
    """Nothing happens: what is expected comes by itself."""


def both(*happenings: Happening) -> Happening:
    """One thing after the other, at once."""

    def happen(scene: Scene) -> None:
        for happening in happenings:
            happening(scene)

    return happen


def apply(**spec: Any) -> Happening:
    """The job is applied; keywords are keys of its spec."""
    return lambda scene: scene.apply(**spec)


def change(**spec: Any) -> Happening:
    """Keys of its spec are changed."""
    return lambda scene: scene.change(**spec)


def suspend(scene: Scene) -> None:
    """Its author suspends it."""
    scene.change(suspend=True)


def resume(scene: Scene) -> None:
    """Its author resumes it."""
    scene.change(suspend=False)


def run(attempt: int = 1, count: int = 1) -> Happening:
    """All pods of an attempt run."""

    def happen(scene: Scene) -> None:
        for pod in scene.pods(attempt, count):
            scene.kubelet.run(pod)

    return happen


def succeeds(message: str | None = None, *, attempt: int = 1, worker: int = 0) -> Happening:
    """A worker ends with exit code 0; worker 0 says what rank 0 says after success."""
    words = message if message is not None else success() if worker == 0 else ""
    return lambda scene: scene.kubelet.succeed(_pod(scene, attempt, worker), words)


def exits(code: int, message: str = "", *, attempt: int = 1, worker: int = 0, reason: str = "Error") -> Happening:
    """A worker ends with an exit code, last words, and the kubelet's reason."""
    return lambda scene: scene.kubelet.fail(_pod(scene, attempt, worker), code, message, reason)


def says(
    reason: Reason, sentence: str = "Do this.", *, code: int, attempt: int = 1, worker: int = 0, **more: Any
) -> Happening:
    """A worker fails and says why; `more` goes into its last words."""
    return exits(code, failure(reason, sentence, **more), attempt=attempt, worker=worker)


def says_user_error(attempt: int = 1) -> Happening:
    """A worker finds something that only the author can mend."""
    return says(Reason.DATA_INVALID, "Row 7 has no messages: correct it.", code=11, attempt=attempt)


def crashes(attempt: int = 1) -> Happening:
    """The trainer is killed by its own segmentation fault: nobody's intention, and another attempt may succeed."""
    return exits(139, attempt=attempt)


def out_of_memory(*, attempt: int = 1, worker: int = 0) -> Happening:
    """The kernel kills a worker that went over its limit."""
    return lambda scene: scene.kubelet.oom_kill(_pod(scene, attempt, worker))


def over_its_limit(*, attempt: int = 1, worker: int = 0) -> Happening:
    """A worker has written more than its cache may hold."""
    return lambda scene: scene.kubelet.evict_for_limit(_pod(scene, attempt, worker))


def evicted(*, attempt: int = 1, worker: int = 0) -> Happening:
    """A node takes a worker off, for want of a resource."""
    return lambda scene: scene.kubelet.evict(_pod(scene, attempt, worker))


def preempted(*, attempt: int = 1, worker: int = 0) -> Happening:
    """The scheduler takes a worker away for a more important pod."""
    return lambda scene: scene.kubelet.preempt(_pod(scene, attempt, worker))


def pod_deleted(*, attempt: int = 1, worker: int = 0) -> Happening:
    """Somebody deletes a worker's pod."""
    return lambda scene: scene.api.delete("Pod", _pod(scene, attempt, worker))


def child_deleted(attempt: int = 1, propagation: str | None = None) -> Happening:
    """Somebody deletes the PyTorchJob of an attempt."""
    return lambda scene: scene.api.delete("PyTorchJob", scene.child(attempt), propagation=propagation)


def queue_holds(attempt: int = 1) -> Happening:
    """Kueue, or somebody like it, suspends the PyTorchJob of an attempt."""
    return lambda scene: _set_suspend(scene, attempt, value=True)


def queue_admits(attempt: int = 1) -> Happening:
    """Kueue, or somebody like it, lets the PyTorchJob of an attempt go, once the training operator has suspended it."""

    def happen(scene: Scene) -> None:
        scene.api.wait("PyTorchJob", scene.child(attempt), lambda found: has_condition(found, "Suspended"))
        _set_suspend(scene, attempt, value=False)

    return happen


def checkpoint(step: int) -> CheckpointResult:
    """A complete checkpoint of a job's training."""
    return CheckpointResult(uri=f"s3://models/team-a/checkpoints/step-{step:08}", step=step)


def _pod(scene: Scene, attempt: int, worker: int) -> str:
    """Name of a worker's pod, once it is there."""
    return str(scene.api.wait("Pod", scene.pod(attempt, worker), bool)["metadata"]["name"])


def _set_suspend(scene: Scene, attempt: int, *, value: bool) -> None:
    name = scene.child(attempt)
    scene.api.wait("PyTorchJob", name, bool)
    scene.api.patch("PyTorchJob", name, {"spec": {"runPolicy": {"suspend": value}}})
