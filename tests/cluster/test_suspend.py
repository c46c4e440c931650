"""Suspension by the author frees the machines and loses nothing; suspension by a queue is the queue's own business."""

from __future__ import annotations

from contextlib import suppress

import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, ApiError, Object, has_condition, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import ADAPTER, Scene, failure, manifest
from tests.cluster.steps import (
    Step,
    apply,
    both,
    cast,
    change,
    checkpoint,
    crashes,
    nothing,
    play,
    play_all,
    queue_admits,
    queue_holds,
    resume,
    run,
    says_user_error,
    succeeds,
    suspend,
)


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


AT_REST = "The job is suspended and holds no machines"
SCENARIOS = {
    "suspended from the start, then resumed": [
        Step(apply(suspend=True), "Suspended", "Suspended", says=AT_REST, attempts=[]),
        Step(resume, "Starting", "Starting", says="Attempt 1"),
        Step(succeeds(), "Succeeded", "Succeeded", says=ADAPTER.uri),
    ],
    "suspended while it runs: resuming is a new attempt, and no failure": [
        Step(apply(backoffLimit=0), "Starting", "Starting"),
        Step(run(), "Preparing", "Preparing"),
        Step(suspend, "Suspended", "Suspended", says=AT_REST, attempts=["Suspended"]),
        Step(resume, "Starting", "Starting", says="Attempt 2", attempts=["Suspended"]),
        Step(run(2), "Preparing", "Preparing"),
        Step(succeeds(attempt=2), "Succeeded", "Succeeded", attempts=["Suspended", "Succeeded"]),
    ],
    "suspended before its pods could start": [
        Step(apply(), "Starting", "Starting"),
        Step(suspend, "Suspended", "Suspended", says=AT_REST, attempts=["Suspended"]),
    ],
    "suspended again and again": [
        Step(apply(), "Starting", "Starting"),
        Step(suspend, "Suspended", "Suspended", says=AT_REST),
        Step(resume, "Starting", "Starting", says="Attempt 2"),
        Step(suspend, "Suspended", "Suspended", says=AT_REST),
        Step(resume, "Starting", "Starting", says="Attempt 3", attempts=["Suspended", "Suspended"]),
    ],
    "suspended when it had failed already": [
        Step(apply(), "Starting", "Starting"),
        Step(both(says_user_error(), suspend), "Failed", "DataInvalid", attempts=["DataInvalid"]),
    ],
    "suspended when it had succeeded already": [
        Step(apply(), "Starting", "Starting"),
        Step(both(succeeds(), suspend), "Succeeded", "Succeeded", attempts=["Succeeded"]),
        Step(resume, "Succeeded", "Succeeded"),
    ],
    "moved to other machines while suspended": [
        Step(apply(), "Starting", "Starting"),
        Step(suspend, "Suspended", "Suspended", says=AT_REST),
        Step(change(workers={"nodes": 2, "gpusPerNode": 0}), "Suspended", "Suspended", says=AT_REST),
        Step(resume, "Starting", "Starting", says="Attempt 2"),
        Step(run(2, count=2), "Preparing", "Preparing", says="all 2 workers run"),
    ],
    "let go by its deadline when it is resumed too late": [
        Step(apply(), "Starting", "Starting"),
        Step(suspend, "Suspended", "Suspended", says=AT_REST),
        Step(both(change(activeDeadlineSeconds=1), resume), "Failed", "DeadlineExceeded", within_seconds=40),
    ],
}


def test_a_job_is_suspended(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    play_all(cast(api, kubelet, SCENARIOS))


def test_a_suspended_job_holds_nothing_and_knows_its_checkpoint(scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    pod = scene.pod()
    with scene.kubelet.holding_deletions():
        play(scene, [Step(suspend, "Suspended", "Suspended", says="on its way out")])
        # Told to stop, the trainer writes a checkpoint and says where it is.
        scene.kubelet.fail(pod, 143, failure(Reason.TERMINATED, checkpoint=checkpoint(70)))
        scene.api.wait("FineTuneJob", scene.name, lambda job: job["status"].get("checkpoint", {}).get("step") == 70)
        scene.kubelet.terminate(pod)
    status = play(
        scene,
        [Step(nothing, "Suspended", "Suspended", says=f"{AT_REST}: set suspend: false to go on from the checkpoint")],
    )
    assert status["checkpoint"] == {"uri": checkpoint(70).uri, "step": 70}
    assert [condition["type"] for condition in status["conditions"]] == ["Succeeded"]
    assert scene.pytorch_jobs() == scene.api.list("Pod") == []
    assert "activeSince" not in status


def test_a_job_that_was_never_resumed_has_nothing(scene: Scene) -> None:
    status = play(scene, [Step(apply(suspend=True), "Suspended", "Suspended")])
    assert scene.pytorch_jobs() == []
    assert scene.api.find("ConfigMap", scene.child()) is None
    assert "startTime" not in status
    assert "attempt" not in status


def test_suspension_that_nobody_saw_is_made_up_for(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator = operator_factory()
    operator.start()
    scene = Scene(api, kubelet, "guard")
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    operator.kill()
    scene.change(suspend=True)
    operator.start()
    play(scene, [Step(nothing, "Suspended", "Suspended", says=AT_REST, attempts=["Suspended"])])
    operator.kill()
    scene.change(suspend=False)
    operator.start()
    play(scene, [Step(run(2), "Preparing", "Preparing", says="Attempt 2")])


QUEUE = "team-a"
QUEUES = {
    "held from the start and admitted": [
        Step(queue_holds(), "Queued", "WaitingForQuota", says=f"waits in the queue {QUEUE} until Kueue admits it"),
        Step(queue_admits(), "Starting", "Starting"),
        Step(run(), "Preparing", "Preparing"),
        Step(succeeds(), "Succeeded", "Succeeded", attempts=["Succeeded"]),
    ],
    "preempted and admitted again": [
        Step(run(), "Preparing", "Preparing"),
        Step(queue_holds(), "Queued", "WaitingForQuota", attempts=[]),
        Step(queue_admits(), "Starting", "Starting", attempts=[]),
        Step(run(), "Preparing", "Preparing", says="Attempt 1"),
        Step(succeeds(), "Succeeded", "Succeeded", attempts=["Succeeded"]),
    ],
    "preempted, then suspended by its author, too": [
        Step(run(), "Preparing", "Preparing"),
        Step(queue_holds(), "Queued", "WaitingForQuota"),
        Step(suspend, "Suspended", "Suspended", says=AT_REST, attempts=["Suspended"]),
        Step(resume, "Starting", "Starting", says="Attempt 2"),
    ],
    "a failure after preemption is a failure": [
        Step(queue_holds(), "Queued", "WaitingForQuota"),
        Step(queue_admits(), "Starting", "Starting"),
        Step(crashes(), "Starting", "Starting", says="Attempt 2", attempts=["TrainerCrashed"]),
    ],
}


def queued(scene: Scene) -> Object:
    """The job with Kueue's labels."""
    body = manifest(scene.name)
    body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": QUEUE, "kueue.x-k8s.io/priority-class": "high"}
    return scene.api.create(body)


def test_a_queue_decides_when_the_workers_run(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    began = Step(queued, "Starting", "Starting")
    play_all(cast(api, kubelet, {name: [began, *steps] for name, steps in QUEUES.items()}))


def test_what_a_queue_did_is_left_alone(scene: Scene) -> None:
    play(scene, [Step(queued, "Starting", "Starting"), *QUEUES["held from the start and admitted"][:1]])
    labels = scene.api.get("PyTorchJob", scene.child())["metadata"]["labels"]
    assert (labels["kueue.x-k8s.io/queue-name"], labels["kueue.x-k8s.io/priority-class"]) == (QUEUE, "high")
    # Admission: Kueue says where the pods go, and lets them.
    worker = {"template": {"spec": {"nodeSelector": {"pool": "a"}, "tolerations": [{"operator": "Exists"}]}}}
    change = {"spec": {"runPolicy": {"suspend": False}, "pytorchReplicaSpecs": {"Worker": worker}}}
    scene.api.patch("PyTorchJob", scene.child(), change)
    play(scene, [Step(run(), "Preparing", "Preparing")])
    workers = scene.api.get("PyTorchJob", scene.child())
    assert workers["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["nodeSelector"] == {"pool": "a"}
    assert workers["spec"]["runPolicy"]["suspend"] is False
    assert "edited" not in scene.condition(scene.status())["message"]


def test_suspension_by_somebody_who_is_no_queue_says_how_to_take_it_back(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(), "Starting", "Starting"),
            Step(
                queue_holds(), "Queued", "WaitingForQuota", says="was suspended by somebody else: set its spec.runPol"
            ),
        ],
    )
    scene.api.wait("PyTorchJob", scene.child(), lambda found: has_condition(found, "Suspended"))
    wait_until(lambda: scene.api.list("Pod"), lambda pods: not pods)


def test_pods_that_take_their_time_to_go_after_preemption_are_nobodys_failure(scene: Scene) -> None:
    """Admitted again while the old pod is on its way out, the attempt goes on, or another one begins without blame.

    Which of the two is the training operator's doing: when it looks while the old pod is there, it counts the pod as
    failed, and the PyTorchJob with it.
    """
    play(scene, [Step(queued, "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    old = scene.api.get("Pod", scene.pod())
    with scene.kubelet.holding_deletions():
        play(scene, [Step(queue_holds(), "Queued", "WaitingForQuota")])
        queue_admits()(scene)
        assert scene.api.get("Pod", scene.pod())["metadata"]["uid"] == old["metadata"]["uid"]
        scene.kubelet.terminate(old)

    def runs() -> Object:
        for pod in scene.api.list("Pod"):
            # Also one that the attempt was still given, and that goes with it.
            if pod["metadata"]["uid"] != old["metadata"]["uid"] and pod["status"].get("phase") == "Pending":
                with suppress(ApiError):
                    scene.kubelet.run(pod)
        return scene.status()

    status = wait_until(runs, lambda status: status.get("phase") == "Preparing")
    assert status.get("failures") is None
    assert all(not attempt["counted"] for attempt in status.get("attempts", []))
