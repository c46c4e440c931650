"""What a job waits for is said while it lasts, with what to do about it, and goes away by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.api import Api, Object, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene
from tests.cluster.steps import Happening, Step, apply, cast, nothing, play, play_all, resume, run, suspend


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


def kubelet_says(what: Callable[[Kubelet, Object, str], object], text: str, count: int = 1) -> Happening:
    """The last pod of the first attempt waits."""
    return lambda scene: what(scene.kubelet, scene.pods(count=count)[-1], text)


NO_ROOM = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
NO_SECRET = 'secret "hf" not found'
TWO = {"nodes": 2, "gpusPerNode": 0}


def one_of_two_runs(scene: Scene) -> None:
    """Worker 0 runs, worker 1 is on its way."""
    first, second = scene.pods(count=2)
    scene.kubelet.run(first)
    scene.kubelet.scheduled(second)


WAITS = ("Unschedulable", "ImagePullFailed", "ConfigurationMissing")
SCENARIOS = {
    "no machine has room": [
        Step(
            kubelet_says(Kubelet.unschedulable, NO_ROOM),
            "Pending",
            "Unschedulable",
            says=f"the worker at present: {NO_ROOM}",
        ),
        Step(run(), "Preparing", "Preparing"),
    ],
    "the image cannot be pulled": [
        Step(
            kubelet_says(Kubelet.pull_fails, "trainer:typo"),
            "Starting",
            "ImagePullFailed",
            says='(ImagePullBackOff: Back-off pulling image "trainer:typo"). It is tried again',
        ),
        Step(run(), "Preparing", "Preparing"),
    ],
    "a Secret is missing": [
        Step(kubelet_says(Kubelet.config_error, NO_SECRET), "Starting", "ConfigurationMissing", says=NO_SECRET),
        Step(run(), "Preparing", "Preparing"),
    ],
    "one thing after another": [
        Step(kubelet_says(Kubelet.unschedulable, NO_ROOM), "Pending", "Unschedulable"),
        Step(lambda scene: scene.kubelet.scheduled(scene.pod()), "Starting", "Starting", says="being started"),
        Step(kubelet_says(Kubelet.pull_fails, "trainer:typo"), "Starting", "ImagePullFailed"),
        Step(kubelet_says(Kubelet.config_error, NO_SECRET), "Starting", "ConfigurationMissing"),
        Step(run(), "Preparing", "Preparing"),
    ],
    "given up while it waits": [
        Step(kubelet_says(Kubelet.unschedulable, NO_ROOM), "Pending", "Unschedulable"),
        Step(suspend, "Suspended", "Suspended", says="holds no machines", attempts=["Suspended"]),
        Step(resume, "Starting", "Starting", says="Attempt 2"),
    ],
}


def test_what_a_job_waits_for_appears_and_clears(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    applied = Step(apply(), "Starting", "Starting")
    stories = cast(api, kubelet, {name: [applied, *steps] for name, steps in SCENARIOS.items()})
    play_all(stories)
    for scene, steps in stories.values():
        waits = [step.reason for step in steps if step.reason in WAITS]
        told = scene.wait_events(1 + len(waits))
        assert [event for event in told if event[1] in WAITS] == [("Warning", reason) for reason in waits]


def test_of_several_workers_those_that_wait_are_counted(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(workers=TWO), "Starting", "Starting", says="0 of 2"),
            Step(one_of_two_runs, "Starting", "Starting", says="1 of 2 workers run"),
            Step(
                kubelet_says(Kubelet.pull_fails, "trainer:typo", 2), "Starting", "ImagePullFailed", says="of worker 1"
            ),
            Step(run(count=2), "Preparing", "Preparing"),
        ],
    )


def quota(name: str, **hard: str) -> Object:
    """A limit for the namespace."""
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": name}, "spec": {"hard": hard}}


def limited(api: Api, name: str, **hard: str) -> None:
    """The namespace is limited from now on."""
    api.create(quota(name, **hard))
    api.wait("ResourceQuota", name, lambda found: found.get("status", {}).get("used"))


def test_pods_that_a_quota_forbids_are_missed_and_come_when_it_is_raised(scene: Scene) -> None:
    limited(scene.api, "no-pods", pods="0")
    sentence = "0 of 1 pods were created after 5 s. `kubectl describe pytorchjob"
    play(
        scene,
        [
            Step(apply(), "Starting", "Starting", says="the worker is being started"),
            Step(nothing, "Starting", "PodsNotCreated", says=sentence),
        ],
    )
    scene.api.delete("ResourceQuota", "no-pods")
    # The training operator tries again when it hears of its job.
    scene.api.patch("PyTorchJob", scene.child(), {"metadata": {"annotations": {"touched": "1"}}})
    play(scene, [Step(run(), "Preparing", "Preparing", attempts=[])])


def test_workers_that_a_quota_forbids_are_created_when_it_is_raised(scene: Scene) -> None:
    limited(scene.api, "no-jobs", **{"count/pytorchjobs.kubeflow.org": "0"})
    play(scene, [Step(apply(), "Pending", "CreationForbidden", says="exceeded quota: no-jobs")])
    assert scene.status().get("attempt") is None
    scene.api.delete("ResourceQuota", "no-jobs")
    play(scene, [Step(run(), "Preparing", "Preparing", says="Attempt 1", attempts=[])])
    assert wait_until(scene.events, lambda events: len(events) > 1)[0] == ("Warning", "CreationForbidden")


def test_a_job_may_be_applied_before_what_it_refers_to(scene: Scene) -> None:
    volumes = [
        {"name": "data", "mountPath": "/data", "persistentVolumeClaim": {"claimName": "later"}},
        {"name": "map", "mountPath": "/map", "configMap": {"name": "later"}},
    ]
    spec = {
        "train_path": "/data/train.jsonl",
        "secrets": {"huggingFace": {"name": "later", "key": "token"}},
        "workers": {"gpusPerNode": 0, "volumes": volumes},
    }
    play(
        scene,
        [
            Step(apply(**spec), "Starting", "Starting"),
            Step(
                kubelet_says(Kubelet.unschedulable, 'persistentvolumeclaim "later" not found.'),
                "Pending",
                "Unschedulable",
                says='persistentvolumeclaim "later" not found',
            ),
            Step(kubelet_says(Kubelet.config_error, 'secret "later" not found'), "Starting", "ConfigurationMissing"),
        ],
    )
    metadata = {"name": "later"}
    scene.api.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"token": "t"}})
    scene.api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    play(scene, [Step(run(), "Preparing", "Preparing", says="Attempt 1", attempts=[])])
