"""A job can be deleted at any moment, operator up or down; what others delete of a job is made up for, or left gone."""

from __future__ import annotations

import pytest

from tests.cluster.api import Api, Object, has_condition, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import ADAPTER, Scene
from tests.cluster.steps import (
    Step,
    apply,
    both,
    cast,
    change,
    child_deleted,
    crashes,
    play,
    play_all,
    run,
    says_user_error,
    succeeds,
    suspend,
)


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


RUNNING = [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")]
DELETED_IN = {
    "running": RUNNING,
    "waiting for its pods": RUNNING[:1],
    "suspended": [Step(apply(suspend=True), "Suspended", "Suspended")],
    "in its second attempt": [
        *RUNNING,
        Step(crashes(), "Starting", "Starting", says="Attempt 2"),
        Step(run(2), "Preparing", "Preparing"),
    ],
    "finished": [*RUNNING, Step(succeeds(), "Succeeded", "Succeeded")],
    "invalid": [Step(apply(train_path="/nowhere"), "Pending", "InvalidSpec", stalled=True)],
}


def nothing_is_left(api: Api) -> None:
    """Every object of a job is gone."""
    for kind in ("FineTuneJob", "PyTorchJob", "Pod", "Service"):
        wait_until(lambda kind=kind: api.list(kind), lambda found: not found)  # type: ignore[misc]
    ours = "finetune.dev/job-name"
    wait_until(lambda: api.list("ConfigMap", labels=ours), lambda found: not found)


def test_a_deleted_job_leaves_nothing(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    stories = cast(api, kubelet, DELETED_IN)
    play_all(stories)
    for scene, _ in stories.values():
        api.delete("FineTuneJob", scene.name)
    nothing_is_left(api)


def test_deletion_in_the_foreground_leaves_nothing_either(scene: Scene) -> None:
    play(scene, RUNNING)
    scene.api.delete("FineTuneJob", scene.name, propagation="Foreground")
    nothing_is_left(scene.api)


def test_a_job_is_deleted_while_no_operator_runs(operator_factory: OperatorFactory, api: Api, kubelet: Kubelet) -> None:
    operator = operator_factory()
    operator.start()
    scene = Scene(api, kubelet, "guard")
    play(scene, RUNNING)
    first, child = scene.job(), scene.child()
    operator.kill()
    api.delete("FineTuneJob", scene.name)
    # No finalizer waits for an operator: garbage collection is all it takes.
    nothing_is_left(api)
    scene.apply()
    operator.start()
    play(scene, [Step(run(), "Preparing", "Preparing", attempts=[])])
    assert scene.job()["metadata"]["uid"] != first["metadata"]["uid"]
    assert scene.child() != child


def test_a_job_is_made_anew_under_the_same_name(scene: Scene) -> None:
    play(scene, [*RUNNING, Step(crashes(), "Starting", "Starting", says="Attempt 2")])
    for _ in range(3):
        old = scene.child()
        scene.api.delete("FineTuneJob", scene.name)
        # At once, while what belonged to the old one is still there.
        play(scene, [Step(apply(), "Starting", "Starting", says="Attempt 1", attempts=[])])
        assert scene.child() != old
    play(
        scene,
        [
            Step(run(), "Preparing", "Preparing", says="Attempt 1", attempts=[]),
            Step(succeeds(), "Succeeded", "Succeeded", says=ADAPTER.uri, attempts=["Succeeded"]),
        ],
    )
    wait_until(scene.pytorch_jobs, lambda found: [job["metadata"]["name"] for job in found] == [scene.child()])


def test_a_job_that_lived_for_a_moment_leaves_nothing(scene: Scene) -> None:
    for _ in range(10):
        scene.apply()
        scene.change(backoffLimit=1)
        scene.api.delete("FineTuneJob", scene.name)
    play(scene, [Step(apply(), "Starting", "Starting"), Step(succeeds(), "Succeeded", "Succeeded")])
    scene.api.delete("FineTuneJob", scene.name)
    nothing_is_left(scene.api)


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
def test_a_pytorchjob_that_somebody_deletes_is_followed_by_another_attempt(scene: Scene, propagation: str) -> None:
    status = play(
        scene,
        [
            *RUNNING,
            Step(
                child_deleted(propagation=propagation),
                "Starting",
                "Starting",
                says="Attempt 2",
                attempts=["WorkersDeleted"],
            ),
            Step(run(2), "Preparing", "Preparing"),
        ],
    )
    assert "failures" not in status
    assert ("Warning", "WorkersDeleted") in scene.events()


def test_no_attempt_begins_beside_pods_that_nobody_owns_any_more(scene: Scene) -> None:
    play(scene, RUNNING)
    pod = scene.pod()
    play(
        scene,
        [
            Step(
                child_deleted(propagation="Orphan"),
                "Retrying",
                "PodsStillEnding",
                says=f"nobody will delete {pod}, since its owner is gone: `kubectl delete pod {pod}`",
                attempts=["WorkersDeleted"],
            ),
            Step(lambda scene: scene.api.delete("Pod", pod), "Starting", "Starting", says="Attempt 2"),
        ],
    )


def has_end(found: Object) -> bool:
    """Whether the training operator knows that a PyTorchJob has ended."""
    return has_condition(found, "Succeeded") or has_condition(found, "Failed")


ENDS = {
    "success": ([*RUNNING, Step(succeeds(), "Succeeded", "Succeeded")], "Succeeded", "Succeeded"),
    "failure": ([*RUNNING, Step(says_user_error(), "Failed", "DataInvalid")], "Failed", "DataInvalid"),
}


@pytest.mark.parametrize(("steps", "phase", "reason"), list(ENDS.values()), ids=list(ENDS))
def test_after_the_end_nothing_is_made_again_whatever_is_deleted(
    operator: OperatorProcess, scene: Scene, steps: list[Step], phase: str, reason: str
) -> None:
    before = play(scene, steps)
    audit = operator.control_plane.audit
    events = len(wait_until(scene.events, lambda found: found[-1][1] == reason))
    # Before that the training operator would make the pod anew, and the operator rightly delete the whole of it.
    scene.api.wait("PyTorchJob", scene.child(), has_end)
    since = audit.position()
    scene.api.delete("Pod", scene.pod())
    scene.api.wait_gone("Pod", scene.pod())
    scene.api.delete("ConfigMap", scene.child())
    scene.api.delete("PyTorchJob", scene.child())
    nothing_but_the_job_is_left(scene)
    # A change of the spec makes the operator look again, and is looked at until its generation is observed.
    play(scene, [Step(both(change(backoffLimit=9), change(suspend=True), change(suspend=False)), phase, reason)])
    generation = scene.job()["metadata"]["generation"]
    scene.api.wait("FineTuneJob", scene.name, lambda job: job["status"]["observedGeneration"] == generation)
    nothing_but_the_job_is_left(scene)
    namespace = scene.api.namespace
    writes = [request for request in operator.writes(since) if request.namespace == namespace]
    assert {(request.verb, request.resource) for request in writes} == {("update", "finetunejobs/status")}
    after = scene.status()
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    assert changed == {"observedGeneration"}
    assert len(scene.events()) == events


def nothing_but_the_job_is_left(scene: Scene) -> None:
    """No child of the job exists."""
    wait_until(lambda: [*scene.api.list("Pod"), *scene.pytorch_jobs()], lambda found: not found)
    assert scene.api.list("ConfigMap", labels="finetune.dev/job-name") == []


def test_a_finished_job_is_not_trained_again_by_an_operator_that_starts(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator = operator_factory()
    operator.start()
    scene = Scene(api, kubelet, "guard")
    play(scene, [*RUNNING, Step(succeeds(), "Succeeded", "Succeeded")])
    operator.stop()
    api.delete("PyTorchJob", scene.child())
    api.delete("ConfigMap", scene.child())
    since = operator.control_plane.audit.position()
    operator.start()
    # It says that it is ready after it has looked at everything once.
    assert operator.writes(since) == []
    play(scene, [Step(suspend, "Succeeded", "Succeeded")])
    assert scene.pytorch_jobs() == []
