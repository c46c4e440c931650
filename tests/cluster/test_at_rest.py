"""Where nothing happens nothing is written; and what people see with kubectl and Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, wait_until
from tests.cluster.audit import Request
from tests.cluster.conftest import OperatorFactory, empty_namespace
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet, Reaper
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, failure, success

RESYNC_SECONDS = 0.5
QUIET_LOOKS = 24
"""Looks at everything while nothing happens: longer than any setting of FAST waits for something to be told."""

STATES = {
    "running": "Preparing Preparing",
    "done": "Succeeded Succeeded",
    "verifying": "Succeeded Succeeded",
    "failed": "Failed DataInvalid",
    "crowded": "Pending Unschedulable",
    "no-image": "Starting ImagePullFailed",
    "queued": "Queued WaitingForQuota",
    "suspended": "Suspended Suspended",
    "invalid": "Pending InvalidSpec",
}
"""Every state that lasts: name of the job -> phase and reason."""
SPECS: dict[str, dict[str, Any]] = {
    "verifying": {"output": {"uri": "s3://models/team-a", "verify": True}},
    "failed": {"ttlSecondsAfterFinished": 3600},
    "crowded": {"activeDeadlineSeconds": 3600},
    "suspended": {"suspend": True},
    "invalid": {"train_path": "data/train.jsonl"},
}


def jobs_in_every_state(api: Api, kubelet: Kubelet) -> None:
    """A job in each of STATES."""
    scenes = {name: Scene(api, kubelet, name) for name in STATES}
    for name, scene in scenes.items():
        scene.apply(**SPECS.get(name, {}))
    scenes["running"].run()
    kubelet.succeed(scenes["done"].pods()[0], success())
    kubelet.succeed(scenes["verifying"].pods()[0], success())
    kubelet.fail(scenes["failed"].pods()[0], 11, failure(Reason.DATA_INVALID))
    kubelet.unschedulable(scenes["crowded"].pods()[0], "0/3 nodes are available: 3 Insufficient gpu.")
    kubelet.pull_fails(scenes["no-image"].pods()[0], "trainer:none")
    scenes["queued"].pods()
    api.patch("PyTorchJob", scenes["queued"].child(), {"spec": {"runPolicy": {"suspend": True}}})
    for name, state in STATES.items():
        phase, reason = state.split()
        scenes[name].wait_reason(reason)
        assert scenes[name].wait_phase(phase)
    kubelet.pull_fails(scenes["verifying"].verifying_pod(), "trainer:none")
    scenes["verifying"].wait_verified("Unknown", "Verifying", "trainer:none")


def asked_meanwhile(operator: OperatorProcess, looks: int) -> list[Request]:
    """What the operator asks for while it looks at everything so many times, beside the lists and watches of that."""
    since = operator.control_plane.audit.position()

    def listed() -> int:
        return sum((r.verb, r.resource) == ("list", "finetunejobs") for r in operator.requests(since))

    wait_until(listed, lambda count: count >= looks, 10 * looks)
    return [request for request in operator.requests(since) if request.verb not in ("list", "watch")]


def test_at_rest_nothing_is_written(operator_factory: OperatorFactory, api: Api, kubelet: Kubelet) -> None:
    operator = operator_factory(resync_seconds=RESYNC_SECONDS)
    operator.start()
    jobs_in_every_state(api, kubelet)
    # Last words of the training operator and of the controller of Jobs may still be on their way, and are read once.
    wait_until(lambda: asked_meanwhile(operator, 8), lambda found: not found, 300)
    assert asked_meanwhile(operator, QUIET_LOOKS) == []


def test_a_restart_over_jobs_in_every_state_writes_nothing(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator = operator_factory()
    operator.start()
    jobs_in_every_state(api, kubelet)
    operator.stop()
    since = operator.control_plane.audit.position()
    operator.start()
    looked_at = Scene(api, kubelet, "another")
    looked_at.apply()
    looked_at.wait_phase("Starting")
    names = {request.name for request in operator.writes(since)}
    assert {name for name in names if name and not name.startswith("another")} == set()


@pytest.fixture(scope="module")
def cast(control_plane: ControlPlane, shared_operator: OperatorProcess, reaper: Reaper) -> Iterator[Api]:
    """Jobs in every state under the shared operator, for tests that look and change nothing; their namespace."""
    shared_operator.start()
    with empty_namespace(control_plane) as api:
        jobs_in_every_state(api, Kubelet(api, reaper))
        yield api


def test_what_kubectl_shows(operator: OperatorProcess, cast: Api, control_plane: ControlPlane) -> None:
    def kubectl(*arguments: str) -> str:
        done = control_plane.kubectl("--namespace", str(cast.namespace), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    header, *lines = kubectl("get", "ftj").splitlines()
    assert header.split() == ["NAME", "PHASE", "REASON", "PROGRESS", "LOSS", "MODEL", "AGE"]
    assert {line.split()[0]: " ".join(line.split()[1:3]) for line in lines} == STATES
    assert "condition met" in kubectl("wait", "--for=condition=Succeeded", "ftj/done", "--timeout=5s")
    assert "condition met" in kubectl("wait", "--for=condition=Stalled", "ftj/failed", "--timeout=5s")
    assert "model_id" in kubectl("explain", "ftj.spec")
    described = kubectl("describe", "ftj", "crowded")
    assert "0/3 nodes are available" in described
    assert "Unschedulable" in described.split("Events:")[1]
    assert "finetunejob.finetune.dev" in kubectl("get", "all", "-o", "name")


def test_metrics_count_what_is_there(operator: OperatorProcess, cast: Api) -> None:
    text = operator.metrics()
    phases = {state.split()[0] for state in STATES.values()}
    assert all(f'finetune_jobs{{phase="{phase}"}}' in text for phase in phases)
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    assert all(float(samples[f'finetune_jobs{{phase="{phase}"}}']) >= 1 for phase in phases)
    assert float(samples['finetune_attempts_total{reason="DataInvalid"}']) >= 1
    assert float(samples["finetune_job_start_seconds_count"]) >= 6
    assert float(samples['finetune_reconcile_total{result="success"}']) >= 1


def test_events_are_told_once(operator: OperatorProcess, cast: Api, reaper: Reaper) -> None:
    """However often a job is looked at."""
    told = {
        "done": [("Normal", "AttemptCreated"), ("Normal", "Succeeded")],
        "failed": [("Normal", "AttemptCreated"), ("Warning", "DataInvalid")],
        "crowded": [("Normal", "AttemptCreated"), ("Warning", "Unschedulable")],
        "no-image": [("Normal", "AttemptCreated"), ("Warning", "ImagePullFailed")],
        "suspended": [],
    }
    for name, events in told.items():
        scene = Scene(cast, Kubelet(cast, reaper), name)
        # An event comes a moment after the status that it is about.
        scene.wait_events(len(events))
        assert scene.events() == events
