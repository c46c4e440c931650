"""The kinds of jobs, the training operator or its webhook are not there: jobs say so, wait, and go on by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.cluster.api import Api, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, manifest, success

PYTORCHJOBS, FINETUNEJOBS = "pytorchjobs.kubeflow.org", "finetunejobs.finetune.dev"
NEVER_SECONDS = 600


@pytest.fixture
def scene(api: Api, kubelet: Kubelet) -> Scene:
    """One job."""
    return Scene(api, kubelet, "guard")


@pytest.fixture
def no_pytorchjobs(control_plane: ControlPlane) -> Iterator[None]:
    """The kind PyTorchJob is not installed at first."""
    control_plane.training_operator.stop()
    control_plane.api.delete("CustomResourceDefinition", PYTORCHJOBS)
    control_plane.api.wait_gone("CustomResourceDefinition", PYTORCHJOBS)
    yield
    control_plane.install_pytorchjobs()
    control_plane.training_operator.start()


def test_jobs_wait_until_the_training_operator_is_installed(
    no_pytorchjobs: None, control_plane: ControlPlane, scene: Scene, operator_factory: OperatorFactory
) -> None:
    # Nothing but an event tells of what happens to the workers: the next resync is far away.
    operator = operator_factory(resync_seconds=NEVER_SECONDS)
    operator.start()
    scene.apply()
    assert "have Kubeflow's training operator (v1) installed" in scene.wait_reason("TrainingOperatorMissing")
    control_plane.install_pytorchjobs()
    control_plane.training_operator.start()
    wait_until(lambda: "watching it from now on" in operator.log())
    # Watching anew concerns the watches alone: trainers can still report.
    assert httpx.get(operator.progress_url, verify=False, timeout=5, trust_env=False).is_client_error  # noqa: S501
    pods = scene.run()
    scene.kubelet.succeed(pods[0], success())
    scene.wait_phase("Succeeded")
    scene.api.delete("FineTuneJob", scene.name)
    scene.apply()
    scene.run()
    scene.api.delete("PyTorchJob", scene.child())
    scene.wait_attempts("WorkersDeleted")


def test_jobs_wait_while_the_kind_is_taken_away(
    control_plane: ControlPlane, scene: Scene, operator_factory: OperatorFactory
) -> None:
    operator = operator_factory()
    operator.start()
    scene.apply()
    scene.run()
    control_plane.api.delete("CustomResourceDefinition", PYTORCHJOBS)
    try:
        control_plane.api.wait_gone("CustomResourceDefinition", PYTORCHJOBS)
        scene.wait_attempts("WorkersDeleted")
        scene.wait_reason("TrainingOperatorMissing")
    finally:
        control_plane.install_pytorchjobs()
        control_plane.training_operator.restart()
    scene.run(attempt=2)
    assert operator.running


def test_an_operator_that_is_older_than_its_own_kind_begins_once_it_is_there(
    control_plane: ControlPlane, scene: Scene, operator_factory: OperatorFactory
) -> None:
    control_plane.api.delete("CustomResourceDefinition", FINETUNEJOBS)
    control_plane.api.wait_gone("CustomResourceDefinition", FINETUNEJOBS)
    operator = operator_factory()
    try:
        operator.server.launch()
        wait_until(lambda: "does not know finetunejobs" in operator.log())
    finally:
        control_plane.install_finetunejobs()
    wait_until(lambda: "watching it from now on" in operator.log())
    operator.server.wait_ready()
    scene.apply()
    scene.run()


def test_a_webhook_that_is_down_holds_jobs_up_and_no_longer(
    control_plane: ControlPlane, scene: Scene, operator_factory: OperatorFactory
) -> None:
    operator = operator_factory()
    operator.start()
    with control_plane.training_operator.stopped():
        scene.apply()
        assert "starts by itself once it does" in scene.wait_reason("TrainingOperatorUnavailable")
        assert scene.events().count(("Warning", "TrainingOperatorUnavailable")) == 1
    scene.run()


def test_missing_pods_are_reported_while_they_are_missing(
    control_plane: ControlPlane, scene: Scene, operator_factory: OperatorFactory
) -> None:
    operator = operator_factory(pods_expected_seconds=1)
    operator.start()
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    scene.api.create(quota)
    scene.api.wait("ResourceQuota", "none", lambda found: found.get("status", {}).get("hard"))
    scene.apply()
    assert "0 of 1 pods were created" in scene.wait_reason("PodsNotCreated")
    scene.api.delete("ResourceQuota", "none")
    # The training operator tries again ever more rarely; another look at the job makes it try now.
    scene.api.patch("PyTorchJob", scene.child(), {"metadata": {"annotations": {"look": "again"}}})
    scene.run()
    neighbour = manifest("neighbour")
    scene.api.create(neighbour)
    Scene(scene.api, scene.kubelet, "neighbour").run()
