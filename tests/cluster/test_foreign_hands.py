"""What others do to a job's objects, by mistake or by intent, has a defined outcome and harms nobody else's job."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.names import child_name
from tests.cluster.api import Api, Object, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import ADAPTER, Scene, manifest, success
from tests.cluster.steps import Step, apply, child_deleted, crashes, nothing, play, resume, run, succeeds
from tests.cluster.test_control_plane import config_map, pod, pytorchjob


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


def named(body: Object, name: str, **labels: str) -> Object:
    """An object with another name and labels."""
    return {**body, "metadata": {**body["metadata"], "name": name, "labels": labels}}


def idle() -> Object:
    """A PyTorchJob that makes no pods, whose names would be those of ours."""
    body = pytorchjob(replicas=1)
    return {**body, "spec": {**body["spec"], "runPolicy": {"suspend": True}}}


FOREIGN: dict[str, Object] = {"PyTorchJob": idle(), "ConfigMap": config_map("foreign")}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_object_of_somebody_else_with_our_name_is_left_alone_and_named(scene: Scene, kind: str) -> None:
    play(scene, [Step(apply(suspend=True), "Suspended", "Suspended")])
    name = scene.child()
    foreign = scene.api.create(named(FOREIGN[kind], name))
    sentence = f"The {kind} {scene.api.namespace}/{name} belongs to somebody else"
    play(scene, [Step(resume, "Pending", "NameTaken", says=sentence)])
    wait_until(scene.events, lambda events: ("Warning", "NameTaken") in events)
    found = scene.api.get(kind, name)
    assert found["metadata"]["uid"] == foreign["metadata"]["uid"]
    assert found.get("spec", found.get("data")) == foreign.get("spec", foreign.get("data"))
    # Another job of the namespace does not wait for this one.
    other = Scene(scene.api, scene.kubelet, "other")
    play(other, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    scene.api.delete(kind, name)
    play(scene, [Step(run(), "Preparing", "Preparing", says="Attempt 1", attempts=[])])


def test_a_pytorchjob_of_an_earlier_job_of_that_name_is_not_adopted(scene: Scene) -> None:
    play(scene, [Step(apply(suspend=True), "Suspended", "Suspended")])
    body = named(pytorchjob(replicas=1), scene.child())
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "controller": True}
    body["metadata"]["ownerReferences"] = [{**owner, "uid": scene.api.create(config_map("owner"))["metadata"]["uid"]}]
    scene.api.create(body)
    play(scene, [Step(resume, "Pending", "NameTaken", says="belongs to somebody else")])


EDITS: dict[str, dict[str, Any]] = {
    "more workers": {"replicas": 2},
    "another image": {"template": {"spec": {"containers": [{"name": "pytorch", "image": "other:1"}]}}},
    "another restart policy": {"restartPolicy": "OnFailure"},
}


@pytest.mark.parametrize("edit", list(EDITS.values()), ids=list(EDITS))
def test_a_child_that_is_edited_by_hand_is_reported_and_left_alone(scene: Scene, edit: dict[str, Any]) -> None:
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    scene.api.patch("PyTorchJob", scene.child(), {"spec": {"pytorchReplicaSpecs": {"Worker": edit}}})
    if "replicas" in edit:
        run(count=2)(scene)
    play(scene, [Step(nothing, "Preparing", "Preparing", says="was edited by hand", attempts=[])])
    worker = scene.api.get("PyTorchJob", scene.child())["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == edit.get("replicas", 1)
    # The next attempt is made without the edit.
    play(scene, [Step(child_deleted(), "Starting", "Starting", says="Attempt 2")])
    worker = scene.api.get("PyTorchJob", scene.child(2))["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert (worker["replicas"], worker["restartPolicy"]) == (1, "Never")
    assert worker["template"]["spec"]["containers"][0]["image"] == "trainer:test"


def test_the_effective_job_cannot_be_edited(scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting")])
    with pytest.raises(Exception, match="immutable"):
        scene.api.patch("ConfigMap", scene.child(), {"data": {"job.yaml": "{}"}})


UID, NAME, ATTEMPT = "finetune.dev/job-uid", "finetune.dev/job-name", "finetune.dev/attempt"
LABELS: dict[str, dict[str, str]] = {
    "no name": {UID: "x"},
    "an empty name": {UID: "", NAME: ""},
    "the name of no job": {UID: "x", NAME: "nobody", ATTEMPT: "1"},
    "no name of a job at all": {UID: "x", NAME: "A_B.C", ATTEMPT: "9" * 30},
    "a word for a number": {UID: "x", NAME: "guard", ATTEMPT: "first"},
}


def test_labels_of_ours_on_the_objects_of_others_do_no_harm(operator: OperatorProcess, scene: Scene) -> None:
    since = operator.server.log_size()
    for number, labels in enumerate(LABELS.values()):
        scene.api.create(named(pod(), f"pod-{number}", **labels))
        scene.api.create(named(pytorchjob(replicas=1), f"job-{number}", **labels))
        scene.api.create(
            {**manifest(f"labelled-{number}"), "metadata": {"name": f"labelled-{number}", "labels": labels}}
        )
    play(
        scene,
        [
            Step(apply(), "Starting", "Starting"),
            Step(crashes(), "Starting", "Starting", says="Attempt 2"),
            Step(succeeds(attempt=2), "Succeeded", "Succeeded"),
        ],
    )
    for number in range(len(LABELS)):
        other = Scene(scene.api, scene.kubelet, f"labelled-{number}")
        play(other, [Step(succeeds(), "Succeeded", "Succeeded")])
    assert len(scene.pytorch_jobs()) == 2 * len(LABELS) + 1
    wait_for_a_resync(operator)
    assert operator.running
    namespace = str(scene.api.namespace)
    errors = [line for line in operator.log(since).splitlines() if " ERROR " in line and namespace in line]
    assert errors == []


def wait_for_a_resync(operator: OperatorProcess) -> None:
    """Return once the operator has looked over the whole cluster again."""
    position = operator.control_plane.audit.position()
    wait_until(
        lambda: [r for r in operator.requests(position) if (r.verb, r.resource) == ("list", "pytorchjobs")],
        timeout_seconds=30,
    )
    position = operator.control_plane.audit.position()
    wait_until(lambda: [r for r in operator.requests(position) if (r.verb, r.resource) == ("list", "finetunejobs")])


def test_a_forged_pod_does_not_end_a_job(scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    uid = scene.job()["metadata"]["uid"]
    labels = {UID: uid, NAME: scene.name, ATTEMPT: "1", "training.kubeflow.org/replica-index": "0"}
    scene.api.create(named(pod(), "forged", **labels))
    scene.kubelet.succeed("forged", success())
    play(
        scene,
        [
            Step(crashes(), "Starting", "Starting", says="Attempt 2", attempts=["TrainerCrashed"]),
            Step(succeeds(attempt=2), "Succeeded", "Succeeded", says=ADAPTER.uri),
        ],
    )


def test_a_status_that_somebody_empties_is_written_again(scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    before = scene.status()
    job = scene.job()
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{scene.api.namespace}/finetunejobs/{scene.name}/status"
    scene.api.request("PUT", path, json={**job, "status": {}})
    status = play(scene, [Step(nothing, "Preparing", "Preparing", says="Attempt 1", attempts=[])])
    assert (status["attempt"], status["attemptStartTime"]) == (1, before["attemptStartTime"])
    assert len(scene.pytorch_jobs()) == 1


def test_a_status_that_makes_no_sense_stops_nobody(scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting")])
    for nonsense in ({"attempt": 7}, {"attempt": 0, "attempts": [{"number": 5}]}, {"failures": 2**40}):
        name = f"other-{len(scene.api.list('FineTuneJob'))}"
        other = Scene(scene.api, scene.kubelet, name)
        play(other, [Step(apply(), "Starting", "Starting")])
        scene.api.patch_status("FineTuneJob", name, nonsense)
    play(scene, [Step(succeeds(), "Succeeded", "Succeeded")])


def test_a_job_that_a_finalizer_of_somebody_else_holds_up_lets_its_machines_go(scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    scene.api.patch("FineTuneJob", scene.name, {"metadata": {"finalizers": ["example.com/wait"]}})
    scene.api.delete("FineTuneJob", scene.name)
    wait_until(scene.pytorch_jobs, lambda found: not found)
    crashes()(scene)
    assert scene.job()["metadata"]["finalizers"] == ["example.com/wait"]
    scene.api.patch("FineTuneJob", scene.name, {"metadata": {"finalizers": None}})
    scene.api.wait_gone("FineTuneJob", scene.name)
    assert scene.pytorch_jobs() == []


def test_the_name_of_a_child_follows_from_the_job_alone() -> None:
    assert child_name("guard", "0123456789", 3) == "guard-01234567-3"
