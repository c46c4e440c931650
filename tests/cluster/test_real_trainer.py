"""The real trainer, started with exactly what the operator put into its pods, against a real S3 server.

Only the kubelet is played: it starts the container's command here. Everything that operator and trainer tell each
other (the job, variables, token, certificate, progress, termination message, exit code) is what it is in a cluster.
Several nodes train in `make e2e`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.api import Api, Object, wait_until
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.pod_process import PodProcess
from tests.cluster.scene import Scene
from tests.cluster.store import store_secret, tiny_bucket, tiny_spec
from tests.s3_server import S3Server

Start = Callable[..., PodProcess]


@pytest.fixture
def bucket(s3_server: S3Server, api: Api) -> str:
    """A bucket with a tiny model and data, and the Secret that jobs of the namespace reach it by."""
    api.create(store_secret(s3_server))
    return tiny_bucket(s3_server, train_rows=24)


@pytest.fixture
def start(control_plane: ControlPlane, api: Api, kubelet: Kubelet, tmp_path: Path) -> Iterator[Start]:
    """Starts the containers of pods; none outlives the test."""
    started: list[PodProcess] = []

    def start_one(pod: Object, **environ: str) -> PodProcess:
        folder = tmp_path / f"pod-{len(started)}"
        started.append(PodProcess(control_plane, api, kubelet, pod, folder, **environ))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()


def test_a_suspended_job_goes_on_from_its_checkpoint(
    operator: OperatorProcess, api: Api, kubelet: Kubelet, start: Start, bucket: str
) -> None:
    """The deleted pod's process gets its signal, saves, and says where; the next attempt begins there."""
    scene = Scene(api, kubelet, "pause")
    scene.apply(
        **tiny_spec(bucket, num_epochs=50, checkpoint_and_evaluation_frequency={"strategy": "steps", "value": 20})
    )
    (pod,) = scene.pods()
    process = start(pod)
    wait_until(scene.status, lambda status: (status.get("progress") or {}).get("step", 0) >= 3, 120)
    with kubelet.holding_deletions():
        scene.change(suspend=True)
        api.wait("Pod", pod["metadata"]["name"], lambda found: "deletionTimestamp" in found["metadata"])
        assert process.stop() == 143, process.log.read_text()
        # A pod that is gone within a moment of its end takes its last words with it.
        wait_until(scene.status, lambda status: "checkpoint" in status, 60)
    status = scene.wait_reason_and_rest("Suspended")
    step = status["checkpoint"]["step"]
    assert step >= 3
    assert status.get("failures") is None

    scene.change(suspend=False)
    (pod,) = scene.pods(attempt=2)
    process = start(pod)
    first = wait_until(scene.status, lambda status: (status.get("progress") or {}).get("step"), 120)
    assert first["progress"]["step"] >= step
    assert process.end() == 0, process.log.read_text()
    status = scene.wait_phase("Succeeded")
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Suspended", "Succeeded"]
