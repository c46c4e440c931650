"""Where nothing happens nothing is written; and what people see with kubectl and Prometheus."""

from __future__ import annotations

import time

import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, failure, success

QUIET_SECONDS = 60
"""A dozen resyncs of the operator in this test."""


def jobs_in_every_state(api: Api, kubelet: Kubelet) -> dict[str, str]:
    """A job in each state that lasts: name -> phase and reason."""

    def scene(name: str) -> Scene:
        return Scene(api, kubelet, name)

    scene("running").apply()
    scene("running").run()
    scene("done").apply()
    kubelet.succeed(scene("done").pods()[0], success())
    scene("verifying").apply(output={"uri": "s3://models/team-a", "verify": True})
    kubelet.succeed(scene("verifying").pods()[0], success())
    scene("failed").apply(ttlSecondsAfterFinished=3600)
    kubelet.fail(scene("failed").pods()[0], 11, failure(Reason.DATA_INVALID))
    scene("crowded").apply(activeDeadlineSeconds=3600)
    kubelet.unschedulable(scene("crowded").pods()[0], "0/3 nodes are available: 3 Insufficient gpu.")
    scene("no-image").apply()
    kubelet.pull_fails(scene("no-image").pods()[0], "trainer:none")
    scene("queued").apply()
    child = scene("queued").child()
    scene("queued").pods()
    api.patch("PyTorchJob", child, {"spec": {"runPolicy": {"suspend": True}}})
    scene("suspended").apply(suspend=True)
    scene("invalid").apply(train_path="data/train.jsonl")
    states = {
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
    for name, state in states.items():
        phase, reason = state.split()
        scene(name).wait_reason(reason)
        assert scene(name).wait_phase(phase)
    kubelet.pull_fails(scene("verifying").verifying_pod(), "trainer:none")
    scene("verifying").wait_verified("Unknown", "Verifying", "trainer:none")
    return states


def test_at_rest_nothing_is_written(operator_factory: OperatorFactory, api: Api, kubelet: Kubelet) -> None:
    operator = operator_factory()
    operator.start()
    jobs_in_every_state(api, kubelet)
    audit = operator.control_plane.audit

    def writes_of_a_moment() -> list[object]:
        since = audit.position()
        time.sleep(3)
        return list(operator.writes(since))

    # The training operator's own last words about a PyTorchJob may still be on their way.
    wait_until(writes_of_a_moment, lambda found: not found)
    since = audit.position()
    time.sleep(QUIET_SECONDS)
    assert operator.writes(since) == []
    # It was no sleep: every resync lists, and watches begin anew. Nothing is read that is known.
    assert {request.verb for request in operator.requests(since)} - {"watch"} == {"list"}


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


@pytest.fixture
def cast(operator: OperatorProcess, api: Api, kubelet: Kubelet) -> dict[str, str]:
    """Jobs in every state under the shared operator."""
    return jobs_in_every_state(api, kubelet)


def test_what_kubectl_shows(cast: dict[str, str], control_plane: ControlPlane, api: Api) -> None:
    def kubectl(*arguments: str) -> str:
        done = control_plane.kubectl("--namespace", str(api.namespace), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    header, *lines = kubectl("get", "ftj").splitlines()
    assert header.split() == ["NAME", "PHASE", "REASON", "PROGRESS", "LOSS", "MODEL", "AGE"]
    assert {line.split()[0]: " ".join(line.split()[1:3]) for line in lines} == cast
    assert "condition met" in kubectl("wait", "--for=condition=Succeeded", "ftj/done", "--timeout=5s")
    assert "condition met" in kubectl("wait", "--for=condition=Stalled", "ftj/failed", "--timeout=5s")
    assert "model_id" in kubectl("explain", "ftj.spec")
    described = kubectl("describe", "ftj", "crowded")
    assert "0/3 nodes are available" in described
    assert "Unschedulable" in described.split("Events:")[1]
    assert "finetunejob.finetune.dev" in kubectl("get", "all", "-o", "name")


def test_metrics_count_what_is_there(cast: dict[str, str], operator: OperatorProcess) -> None:
    text = operator.metrics()
    phases = {state.split()[0] for state in cast.values()}
    assert all(f'finetune_jobs{{phase="{phase}"}}' in text for phase in phases)
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    assert all(float(samples[f'finetune_jobs{{phase="{phase}"}}']) >= 1 for phase in phases)
    assert float(samples['finetune_attempts_total{reason="DataInvalid"}']) >= 1
    assert float(samples["finetune_job_start_seconds_count"]) >= 6
    assert float(samples['finetune_reconcile_total{result="success"}']) >= 1


def test_events_are_told_once(cast: dict[str, str], operator: OperatorProcess, api: Api, kubelet: Kubelet) -> None:
    """However often a job is looked at."""
    told = {
        "done": [("Normal", "AttemptCreated"), ("Normal", "Succeeded")],
        "failed": [("Normal", "AttemptCreated"), ("Warning", "DataInvalid")],
        "crowded": [("Normal", "AttemptCreated"), ("Warning", "Unschedulable")],
        "no-image": [("Normal", "AttemptCreated"), ("Warning", "ImagePullFailed")],
        "suspended": [],
    }
    for name, events in told.items():
        scene = Scene(api, kubelet, name)
        # An event comes a moment after the status that it is about.
        scene.wait_events(len(events))
        assert scene.events() == events
