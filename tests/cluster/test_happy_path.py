"""From apply to the adapter's address: what is created, what status says on the way, and whose word ends a job."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from finetune_api.outcome import AdapterResult
from tests.cluster.api import Api, Object, has_condition
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import ADAPTER, Scene, manifest, success
from tests.cluster.steps import Step, apply, cast, exits, play, play_all, run, succeeds

NODES = {"nodes": 2, "gpusPerNode": 0}


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


SCENARIOS = {
    "one worker": [
        Step(apply(), "Starting", "Starting", says="Attempt 1: the worker is being started."),
        Step(run(), "Preparing", "Preparing", says="Attempt 1: the worker runs."),
        Step(succeeds(), "Succeeded", "Succeeded", says=ADAPTER.uri, attempts=["Succeeded"]),
    ],
    "of two workers the second may end first": [
        Step(apply(workers=NODES), "Starting", "Starting", says="0 of 2 workers run"),
        Step(run(count=2), "Preparing", "Preparing", says="all 2 workers run"),
        Step(succeeds(worker=1), "Preparing", "Preparing", attempts=[]),
        Step(succeeds(), "Succeeded", "Succeeded", says=ADAPTER.uri, attempts=["Succeeded"]),
    ],
    "once rank 0 has published, nobody waits for a worker that hangs": [
        Step(apply(workers=NODES), "Starting", "Starting"),
        Step(run(count=2), "Preparing", "Preparing"),
        Step(succeeds(), "Succeeded", "Succeeded", attempts=["Succeeded"]),
    ],
    "an adapter that was published counts although the trainer crashed afterwards": [
        Step(apply(), "Starting", "Starting"),
        Step(run(), "Preparing", "Preparing"),
        Step(exits(139, success()), "Succeeded", "Succeeded", says=ADAPTER.uri),
    ],
    "success is rank 0's to tell: the words of another worker are none": [
        Step(apply(workers=NODES, backoffLimit=0), "Starting", "Starting"),
        Step(run(count=2), "Preparing", "Preparing"),
        Step(succeeds(success(), worker=1), "Preparing", "Preparing"),
        Step(succeeds("done"), "Failed", "RetriesExhausted", says="left no result", attempts=["ResultMissing"]),
    ],
}


def test_a_job_succeeds_with_the_words_of_rank_0(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    play_all(cast(api, kubelet, SCENARIOS))


def test_status_keeps_what_the_trainer_said_last(scene: Scene) -> None:
    status = play(scene, SCENARIOS["one worker"])
    assert status["adapter"] == {
        "uri": ADAPTER.uri,
        "format": "peft",
        "baseModel": "acme/model",
        "sha256": "0" * 64,
        "sizeBytes": 4_900_000,
    }
    assert status["dataset"]["rows"] == 100
    assert status["metrics"] == {"trainLoss": 0.5, "evalLoss": 0.4}
    assert status["checkpoint"]["step"] == 10
    assert status["progress"]["percent"] == 100
    assert status["startTime"] <= status["completionTime"]
    assert "activeSince" not in status
    # Neither Reconciling nor Stalled, and about the spec as it is: kstatus then calls a job current.
    (condition,) = status["conditions"]
    assert (condition["status"], condition["observedGeneration"], status["observedGeneration"]) == ("True", 1, 1)


def test_the_workers_read_the_effective_job_from_a_config_map(scene: Scene) -> None:
    play(scene, SCENARIOS["one worker"][:1])
    job, name = scene.job(), scene.child()
    config_map, workers = scene.api.get("ConfigMap", name), scene.api.get("PyTorchJob", name)
    assert config_map["immutable"]
    effective = yaml.safe_load(config_map["data"]["job.yaml"])["spec"]
    assert (effective["learning_rate"], effective["output"]["uri"]) == (0.0001, "s3://models/team-a")
    for child in (config_map, workers):
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (job["metadata"]["uid"], True)
        assert child["metadata"]["labels"]["finetune.dev/job-name"] == "guard"
    (pod,) = scene.pods()
    mounted = [volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume]
    assert mounted == [name]


def test_what_is_left_running_goes_when_a_job_has_succeeded(scene: Scene) -> None:
    play(scene, SCENARIOS["once rank 0 has published, nobody waits for a worker that hangs"])
    for worker in (0, 1):
        scene.api.wait_gone("Pod", scene.pod(worker=worker))
    assert scene.api.find("ConfigMap", scene.child())


def test_what_has_ended_stays_for_its_logs(scene: Scene) -> None:
    play(scene, SCENARIOS["of two workers the second may end first"])
    workers = scene.api.wait("PyTorchJob", scene.child(), lambda found: has_condition(found, "Succeeded"))
    assert workers["spec"]["runPolicy"]["cleanPodPolicy"] == "None"
    assert len(scene.pods(count=2)) == 2


EVERYTHING: dict[str, Any] = {
    "nodes": 3,
    "gpusPerNode": 2,
    "gpuResourceName": "amd.com/gpu",
    "image": "registry.example/trainer:1",
    "imagePullPolicy": "Always",
    "imagePullSecrets": [{"name": "pull"}],
    "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": 2, "memory": "1Gi"}},
    "nodeSelector": {"zone": "a"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "env": [
        {"name": "PLAIN", "value": "1"},
        {"name": "FROM_SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}},
        {"name": "FROM_MAP", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}},
        {"name": "FROM_FIELD", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
    ],
    "volumes": [
        {"name": "data", "mountPath": "/data", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "more", "mountPath": "/more", "configMap": {"name": "more"}},
        {"name": "hidden", "mountPath": "/hidden", "secret": {"secretName": "hidden"}},
        {"name": "room", "mountPath": "/room", "emptyDir": {}},
    ],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
            }
        }
    },
    "serviceAccountName": "trainer",
}


def test_everything_that_a_job_may_ask_for_is_admitted_and_is_not_taken_for_an_edit(scene: Scene) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trainer"}}
    scene.api.create(account)
    secrets = {"huggingFace": {"name": "hf", "key": "token"}, "objectStore": {"name": "s3"}}
    play(
        scene,
        [
            Step(apply(workers=EVERYTHING, secrets=secrets), "Starting", "Starting"),
            Step(run(count=3), "Preparing", "Preparing", says="all 3 workers run"),
        ],
    )
    status = scene.status()
    assert "edited" not in scene.condition(status)["message"]


def test_a_name_may_have_any_length(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    names = {"shortest": "x", "longest": "a" * 63, "cut behind a dash": f"{'a' * 35}-{'b' * 27}"}
    play_all({why: (Scene(api, kubelet, name), SCENARIOS["one worker"]) for why, name in names.items()})


def test_jobs_with_the_same_long_beginning_do_not_meet(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    scenes = [Scene(api, kubelet, f"{'a' * 50}-{end}") for end in ("one", "two")]
    for number, scene in enumerate(scenes):
        adapter = AdapterResult(uri=f"s3://models/{number}", base_model="acme/model", sha256="0" * 64, size_bytes=1)
        play(
            scene,
            [
                Step(apply(), "Starting", "Starting"),
                Step(succeeds(success(adapter)), "Succeeded", "Succeeded", says=f"s3://models/{number}"),
            ],
        )
    assert len({scene.child() for scene in scenes}) == 2


def test_a_drawn_name_is_as_good_as_a_given_one(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    body: Object = manifest("unused")
    body["metadata"] = {"generateName": "guard-"}
    name = api.create(body)["metadata"]["name"]
    scene = Scene(api, kubelet, name)
    play(scene, [Step(succeeds_once_there, "Succeeded", "Succeeded")])


def succeeds_once_there(scene: Scene) -> None:
    """The pod ends as soon as it exists."""
    scene.pods()
    succeeds()(scene)
