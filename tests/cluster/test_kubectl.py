"""What people and scripts do with kubectl: wait for a job, watch it go through every phase, read about its keys."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune_trainer.train.progress_status import Phase, Progress, trainer_status
from tests.cluster.api import Api, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.reporter import Reporter
from tests.cluster.scene import ADAPTER, Scene
from tests.cluster.steps import (
    Happening,
    Step,
    apply,
    crashes,
    nothing,
    play,
    pod_deleted,
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


def kubectl(control_plane: ControlPlane, api: Api, *arguments: str) -> str:
    """What kubectl prints; it must have nothing to complain of."""
    done = control_plane.kubectl("--namespace", str(api.namespace), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def columns(control_plane: ControlPlane, scene: Scene) -> list[str]:
    """What `kubectl get ftj` shows of the job between its name and its age."""
    return kubectl(control_plane, scene.api, "get", "ftj", scene.name, "--no-headers").split()[1:-1]


MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"


def test_every_phase_is_shown(
    control_plane: ControlPlane, operator: OperatorProcess, scene: Scene, tmp_path: Path
) -> None:
    reporter = Reporter(control_plane, operator, scene.api, tmp_path)
    no_room = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    shown: list[list[str]] = []

    def step(happens: Happening, phase: str, reason: str | None = None) -> None:
        play(scene, [Step(happens, phase, reason or phase)])
        shown.append(columns(control_plane, scene))

    def report(phase: Phase, percent: int, loss: float | None = None) -> None:
        progress = Progress(phase=phase, percent=percent, step=percent, total_steps=100, loss=loss)
        endpoint = reporter.endpoint(reporter.token(scene.api.get("Pod", scene.pod(attempt=2))))
        endpoint.post(trainer_status(progress, datetime.now(UTC)))

    step(apply(), "Starting")
    step(lambda scene: scene.kubelet.unschedulable(scene.pods()[0], no_room), "Pending", "Unschedulable")
    step(queue_holds(), "Queued", "WaitingForQuota")
    step(queue_admits(), "Starting")
    step(run(), "Preparing")
    with scene.kubelet.holding_deletions():
        step(pod_deleted(), "Retrying", "PodsStillEnding")
    play(scene, [Step(run(2), "Preparing", "Preparing", says="Attempt 2")])
    step(lambda _: report(Phase.RUNNING, 40, 1.25), "Running")
    step(lambda _: report(Phase.PUBLISHING, 99), "Publishing")
    step(suspend, "Suspended")
    step(resume, "Starting")
    step(succeeds(attempt=3), "Succeeded")
    assert [line[:2] for line in shown] == [
        ["Starting", "Starting"],
        ["Pending", "Unschedulable"],
        ["Queued", "WaitingForQuota"],
        ["Starting", "Starting"],
        ["Preparing", "Preparing"],
        ["Retrying", "PodsStillEnding"],
        ["Running", "Running"],
        ["Publishing", "Publishing"],
        ["Suspended", "Suspended"],
        ["Starting", "Starting"],
        ["Succeeded", "Succeeded"],
    ]
    assert shown[6][2:] == ["40", "1.25", MODEL]
    assert shown[-1][2:] == ["100", MODEL]
    assert ADAPTER.uri in kubectl(control_plane, scene.api, "get", "ftj", scene.name, "-o", "wide")


def test_a_script_waits_for_the_end(control_plane: ControlPlane, scene: Scene) -> None:
    """It began to wait long before; a job that fails ends the wait for success only by its time."""
    said: dict[str, str] = {}

    def wait(name: str, condition: str) -> None:
        said[name] = kubectl(control_plane, scene.api, "wait", f"--for={condition}", f"ftj/{name}", "--timeout=60s")

    bad = Scene(scene.api, scene.kubelet, "bad")
    for each in (scene, bad):
        play(each, [Step(apply(), "Starting", "Starting")])
    waits = {scene.name: "condition=Succeeded", bad.name: "condition=Succeeded=False"}
    threads = [threading.Thread(target=wait, args=item) for item in waits.items()]
    for thread in threads:
        thread.start()
    assert not said
    play(scene, [Step(succeeds(), "Succeeded", "Succeeded")])
    play(bad, [Step(says_user_error(), "Failed", "DataInvalid")])
    for thread in threads:
        thread.join()
    assert sorted(said) == sorted(waits)
    assert all("condition met" in text for text in said.values())
    path = "jsonpath={.status.phase}={.status.conditions[?(@.type=='Stalled')].reason}"
    assert kubectl(control_plane, scene.api, "get", "ftj", bad.name, "-o", path) == "Failed=DataInvalid"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("ftj.spec", ["model_id", "train_path", "lora_config", "workers", "backoffLimit", "-required-"]),
        ("ftj.spec.workers", ["gpusPerNode", "nodeSelector", "Default: one node"]),
        ("ftj.spec.workers.env.valueFrom.secretKeyRef", ["name", "key"]),
        ("ftj.spec.generation_config.prompt_format", ["system", "assistant"]),
        ("ftj.status.conditions", ["lastTransitionTime", "Stalled"]),
        ("ftj.status.adapter.sha256", ["manifest.json"]),
    ],
)
def test_keys_are_explained(control_plane: ControlPlane, path: str, words: list[str]) -> None:
    done = control_plane.kubectl("explain", path)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert [word for word in words if word not in text] == []


def test_every_key_is_explained_in_words(control_plane: ControlPlane) -> None:
    """`kubectl explain --recursive` names them all; the schema must say something about each."""
    found = control_plane.api.get("CustomResourceDefinition", "finetunejobs.finetune.dev")
    schema = found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    bare: list[str] = []

    def visit(path: str, node: object) -> None:
        assert isinstance(node, dict)
        if "description" not in node:
            bare.append(path)
        for key, inner in (node.get("properties") or {}).items():
            visit(f"{path}.{key}", inner)
        if isinstance(node.get("items"), dict):
            for key, inner in (node["items"].get("properties") or {}).items():
                visit(f"{path}[].{key}", inner)

    for top in ("spec", "status"):
        visit(top, schema[top])
    assert bare == []


def test_an_applied_status_is_nobodys(control_plane: ControlPlane, scene: Scene) -> None:
    play(scene, [Step(apply(), "Starting", "Starting"), Step(succeeds(), "Succeeded", "Succeeded")])
    exported = json.loads(kubectl(control_plane, scene.api, "get", "ftj", scene.name, "-o", "json"))
    scene.api.delete("FineTuneJob", scene.name)
    wait_until(scene.pytorch_jobs, lambda found: not found)
    # As a backup restores it: with the status of a job that has ended, which the server does not take.
    for key in ("uid", "resourceVersion", "managedFields", "creationTimestamp", "generation"):
        exported["metadata"].pop(key, None)
    done = control_plane.kubectl("-n", str(scene.api.namespace), "create", "-f", "-", stdin=json.dumps(exported))
    assert done.returncode == 0, done.stderr
    play(scene, [Step(run(), "Preparing", "Preparing", says="Attempt 1", attempts=[])])


def test_gpus_in_use_are_those_of_attempts_that_run(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator = operator_factory()
    operator.start()
    scene = Scene(api, kubelet, "guard")

    def gpus(count: int) -> None:
        wait_until(lambda: f"finetune_gpus_in_use {float(count)}\n" in operator.metrics())

    play(scene, [Step(apply(workers={"nodes": 2, "gpusPerNode": 4}), "Starting", "Starting")])
    gpus(8)
    play(scene, [Step(queue_holds(), "Queued", "WaitingForQuota")])
    gpus(0)
    play(scene, [Step(queue_admits(), "Starting", "Starting"), Step(run(count=2), "Preparing", "Preparing")])
    gpus(8)
    play(scene, [Step(suspend, "Suspended", "Suspended", says="holds no machines")])
    gpus(0)
    play(
        scene,
        [Step(resume, "Starting", "Starting", says="Attempt 2"), Step(crashes(2), "Starting", "Starting", "Attempt 3")],
    )
    play(scene, [Step(succeeds(attempt=3), "Succeeded", "Succeeded"), Step(nothing, "Succeeded", "Succeeded")])
    gpus(0)
    text = operator.metrics()
    ended = {"Suspended": 1, "TrainerCrashed": 1, "Succeeded": 1}
    for reason, count in ended.items():
        assert f'finetune_attempts_total{{reason="{reason}"}} {float(count)}\n' in text
    # Neither jobs nor namespaces are labels: their number has no limit.
    assert "guard" not in text
    assert str(api.namespace) not in text
