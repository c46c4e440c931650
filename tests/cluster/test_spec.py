"""What a spec may say and when it may change: refused at apply where the schema reaches, else by a stalled job.

Neither ever stops another job.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.cluster.api import Api, Object, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import ADAPTER, SPEC, Scene, manifest
from tests.cluster.steps import Step, apply, both, change, crashes, nothing, play, resume, run, succeeds, suspend


@pytest.fixture
def scene(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> Scene:
    """A job called guard, not applied yet."""
    return Scene(api, kubelet, "guard")


def kubectl_apply(control_plane: ControlPlane, api: Api, body: Object, *flags: str) -> str:
    """What kubectl says to a manifest: its errors, or what it has done."""
    namespace = api.namespace or ""
    found = control_plane.kubectl("apply", "-n", namespace, "-f", "-", *flags, stdin=yaml.safe_dump(body))
    return found.stderr if found.returncode else found.stdout


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"learning_rat": 0.1}, 'unknown field "spec.learning_rat"'),
    "an unknown key further down": ({"lora_config": {"rank": 8}}, 'unknown field "spec.lora_config.rank"'),
    "no data": ({"train_path": None}, "spec.train_path: Required value"),
    "no model": ({"model_id": None}, "spec.model_id: Required value"),
    "text where a number belongs": ({"num_epochs": "three"}, "spec.num_epochs: Invalid value"),
    "less than one node": ({"workers": {"nodes": 0}}, "spec.workers.nodes: Invalid value: 0"),
    "a negative limit": ({"backoffLimit": -1}, "spec.backoffLimit: Invalid value: -1"),
    "another task": ({"task": "preference_tuning"}, "spec.task: Invalid value"),
    "a scheme that nobody reads": ({"train_path": "gs://b/k.jsonl"}, "train_path has a scheme that is not read"),
    "a password as a plain variable": (
        {"workers": {"env": [{"name": "HF_TOKEN", "value": "hf_x"}]}},
        "the value of this environment variable is a secret",
    ),
    "a volume of two kinds": (
        {"workers": {"volumes": [{"name": "v", "mountPath": "/v", "emptyDir": {}, "configMap": {"name": "m"}}]}},
        "a volume needs exactly one of",
    ),
}


@pytest.mark.parametrize(("spec", "sentence"), list(REFUSED.values()), ids=list(REFUSED))
def test_kubectl_apply_refuses_with_a_sentence(
    control_plane: ControlPlane, api: Api, spec: dict[str, Any], sentence: str
) -> None:
    assert sentence in kubectl_apply(control_plane, api, manifest("guard", **spec))
    assert api.list("FineTuneJob") == []


@pytest.mark.parametrize("name", ["1guard", "guard.v2", "g" * 64])
def test_a_name_that_no_pod_could_have_is_refused(control_plane: ControlPlane, api: Api, name: str) -> None:
    assert "metadata.name" in kubectl_apply(control_plane, api, manifest(name))


IMMUTABLE: dict[str, dict[str, Any]] = {
    "changed": {"train_path": "s3://data/other.jsonl"},
    "added": {"valid_path": "s3://data/valid.jsonl"},
    "taken away": {"lora_config": None},
    "changed further down": {"lora_config": {"r": 16}},
    "output": {"output": {"uri": "s3://elsewhere"}},
}


@pytest.mark.parametrize("spec", list(IMMUTABLE.values()), ids=list(IMMUTABLE))
def test_what_is_trained_cannot_change(control_plane: ControlPlane, api: Api, spec: dict[str, Any]) -> None:
    assert "created" in kubectl_apply(control_plane, api, manifest("guard"))
    (key,) = spec
    said = kubectl_apply(control_plane, api, manifest("guard", **spec))
    assert f"{key} is immutable, since it decides what is trained: create a new FineTuneJob." in said


def test_applying_the_same_file_again_changes_nothing(control_plane: ControlPlane, scene: Scene) -> None:
    body = manifest(scene.name)
    for flags in (("--server-side",), ("--server-side",)):
        assert "guard" in kubectl_apply(control_plane, scene.api, body, *flags)
    play(scene, [Step(run(), "Preparing", "Preparing")])
    kubectl_apply(control_plane, scene.api, body, "--server-side")
    assert scene.job()["metadata"]["generation"] == 1
    # Of the server's fields, too, nothing is left that a difference would show.
    found = control_plane.kubectl(
        "diff", "--server-side", "-n", scene.api.namespace or "", "-f", "-", stdin=yaml.dump(body)
    )
    assert (found.returncode, found.stdout) == (0, "")


CHECKPOINT = "initial_base_model_ckpt_path"


def test_a_change_that_only_the_operator_sees_stalls_the_job_and_leaves_the_attempt_alone(scene: Scene) -> None:
    first = {CHECKPOINT: "s3://models/a"}
    sentence = "what is trained was changed after the first attempt had begun: put it back as it was"
    goes_on = "The current attempt goes on as it began."
    status = play(
        scene,
        [
            Step(apply(**first), "Starting", "Starting"),
            Step(run(), "Preparing", "Preparing"),
            Step(change(**{CHECKPOINT: "s3://models/b"}), "Preparing", "InvalidSpec", says=sentence, stalled=True),
        ],
    )
    assert goes_on in scene.condition(status)["message"]
    assert ("Warning", "InvalidSpec") in wait_until(scene.events, lambda events: events[-1][1] == "InvalidSpec")
    # No attempt is made of the changed spec: it is not what the first one has trained.
    play(scene, [Step(crashes(), "Pending", "InvalidSpec", says=sentence, attempts=["TrainerCrashed"], stalled=True)])
    assert scene.pytorch_jobs() == []
    play(
        scene,
        [
            Step(change(**first), "Starting", "Starting", says="Attempt 2"),
            Step(succeeds(attempt=2), "Succeeded", "Succeeded", says=ADAPTER.uri),
        ],
    )


def test_an_attempt_that_succeeds_although_its_spec_was_changed_meanwhile_has_succeeded(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(), "Starting", "Starting"),
            Step(change(**{CHECKPOINT: {"repo_id": "a/b"}}), "Starting", "InvalidSpec", stalled=True),
            Step(succeeds(), "Succeeded", "Succeeded", says=ADAPTER.uri, stalled=False),
        ],
    )


def test_machines_that_are_changed_while_the_job_runs_wait_for_the_next_attempt(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(), "Starting", "Starting"),
            Step(run(), "Preparing", "Preparing"),
            Step(change(workers={"nodes": 2, "gpusPerNode": 0}), "Preparing", "Preparing", says="Note: spec.workers"),
            Step(crashes(), "Starting", "Starting", says="Attempt 2: 0 of 2 workers run"),
            Step(run(2, count=2), "Preparing", "Preparing", says="all 2 workers run."),
        ],
    )
    # That it was done is no longer worth a note.
    scene.api.wait("FineTuneJob", scene.name, lambda job: "Note" not in scene.condition(job["status"])["message"])


STALLED: dict[str, tuple[dict[str, Any], str]] = {
    "a path of the author's machine": (
        {"train_path": "/home/me/train.jsonl"},
        "spec.train_path: /home/me/train.jsonl is a local path, and no volume of the job holds it in a pod",
    ),
    "an output that goes with the pod": (
        {
            "output": {"uri": "/room"},
            "workers": {"volumes": [{"name": "room", "mountPath": "/room", "emptyDir": {}}]},
        },
        "spec.output.uri: /room is on the emptyDir volume room",
    ),
    "a model without a prompt format": ({"model_id": "acme/model"}, "spec.generation_config"),
    "a variable of the operator's": (
        {"workers": {"env": [{"name": "PET_NNODES", "value": "7"}]}},
        "spec.workers.env[0]: PET_NNODES cannot be set in a cluster",
    ),
    "a volume over the job's own file": (
        {"workers": {"volumes": [{"name": "v", "mountPath": "/etc", "configMap": {"name": "m"}}]}},
        "spec.workers.volumes[0].mountPath: /etc would hide",
    ),
}


def test_an_invalid_spec_stalls_its_job_and_no_other(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    for number, (spec, sentence) in enumerate(STALLED.values()):
        poison = Scene(api, kubelet, f"poison-{number}")
        status = play(poison, [Step(apply(**spec), "Pending", "InvalidSpec", says=sentence, stalled=True)])
        assert [condition["type"] for condition in status["conditions"]] == ["Succeeded", "Stalled"]
        assert wait_until(poison.events) == [("Warning", "InvalidSpec")]
    assert api.list("PyTorchJob") == []
    good = Scene(api, kubelet, "good")
    play(good, [Step(apply(), "Starting", "Starting"), Step(succeeds(), "Succeeded", "Succeeded")])


def test_a_pod_that_the_api_server_refuses_stalls_the_job(scene: Scene) -> None:
    """What no check of ours foresees: a PyTorchJob that its own webhook or schema does not take."""
    quantity = {"resources": {"limits": {"memory": "1Gi"}, "requests": {"memory": "2Gi"}}}
    scene.apply(workers=quantity | {"gpusPerNode": 0})
    # The training operator cannot make such a pod; the job says so and does not claim to run.
    play(scene, [Step(nothing, "Starting", "PodsNotCreated", says="0 of 1 pods were created")])


def test_a_stalled_job_goes_on_when_it_is_corrected(scene: Scene) -> None:
    bad = {"workers": {"gpusPerNode": 0, "env": [{"name": "HOME", "value": "/root"}]}}
    play(
        scene,
        [
            Step(apply(**bad), "Pending", "InvalidSpec", says="HOME cannot be set", stalled=True),
            Step(change(workers={"env": []}), "Starting", "Starting", says="Attempt 1"),
            Step(succeeds(), "Succeeded", "Succeeded"),
        ],
    )


def test_a_suspended_job_with_an_invalid_spec_says_so_when_it_is_resumed(scene: Scene) -> None:
    play(
        scene,
        [
            Step(apply(suspend=True, train_path="/home/me"), "Suspended", "Suspended"),
            Step(resume, "Pending", "InvalidSpec", says="/home/me is a local path", stalled=True),
            Step(suspend, "Suspended", "Suspended", stalled=False),
        ],
    )


def test_without_an_output_of_the_operators_a_job_has_to_name_one(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator_factory(default_output_uri=None).start()
    scene, named = Scene(api, kubelet, "guard"), Scene(api, kubelet, "named")
    sentence = "spec.output: output is required, since this operator has no default for it"
    play(scene, [Step(apply(), "Pending", "InvalidSpec", says=sentence, stalled=True)])
    play(named, [Step(apply(output={"uri": "s3://models/mine"}), "Starting", "Starting")])


def test_an_attempt_is_made_of_the_output_that_the_first_one_had(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator = operator_factory(default_output_uri="s3://models/old")
    operator.start()
    scene = Scene(api, kubelet, "guard")
    play(scene, [Step(apply(), "Starting", "Starting"), Step(run(), "Preparing", "Preparing")])
    operator.stop()
    operator_factory(default_output_uri="s3://models/new").start()
    # Upgrading the operator is no change of the job's: what runs goes on, and resumes where it left off.
    play(scene, [Step(both(nothing, crashes()), "Starting", "Starting", says="Attempt 2", attempts=["TrainerCrashed"])])
    assert yaml.safe_load(scene.effective(2))["spec"]["output"]["uri"] == "s3://models/old"
    assert SPEC.get("output") is None
