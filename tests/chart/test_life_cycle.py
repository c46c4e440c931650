"""A release is installed, upgraded under a running job, and removed: nothing restarts, and only what is said stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator.names import CA_CONFIG_MAP, TLS_SECRET
from tests.chart.charts import NAMESPACE, RELEASE, TEAMS, Object
from tests.chart.release import CRD, GARBAGE_SECONDS, QUICK, Release, next_version, spec_of
from tests.cluster.api import Api, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, success

TEAM = TEAMS[0]
LEFT_BY_THE_OPERATOR = f"ConfigMap {TEAM}/{CA_CONFIG_MAP}"
TAKE_OVER = "--take-ownership"
"""The kind is in the cluster already, and no release's."""


@pytest.fixture
def scene(release: Release, kubelet: Kubelet) -> Scene:
    """A job that runs under an operator of the release."""
    release.install(QUICK, TAKE_OVER)
    release.operator()
    scene = Scene(release.plane.api.in_namespace(TEAM), kubelet, "guard")
    scene.apply()
    scene.run()
    return scene


def _identity(found: Object) -> tuple[str, int, object]:
    metadata = found["metadata"]
    return metadata["uid"], metadata.get("generation", 0), found.get("spec")


def test_an_upgrade_restarts_nothing(release: Release, scene: Scene, kubelet: Kubelet, tmp_path: Path) -> None:
    api = scene.api
    secret = api.get("Secret", TLS_SECRET, NAMESPACE)
    job, child, pod = scene.job(), api.get("PyTorchJob", scene.child()), api.get("Pod", scene.pod())
    config_map = api.get("ConfigMap", scene.child())
    release.upgrade(next_version(tmp_path, "0.2.0"))
    for process in release.operators:
        process.stop()
    operator = release.operator()
    # It has looked at everything by now; once more, to see that it stays so.
    looked = operator.control_plane.audit.position()
    wait_until(lambda: any(request.resource == "pytorchjobs" for request in operator.requests(looked)))
    assert _identity(api.get("Pod", scene.pod())) == _identity(pod)
    assert _identity(api.get("PyTorchJob", scene.child())) == _identity(child)
    assert _identity(scene.job()) == _identity(job)
    assert (
        api.get("ConfigMap", scene.child())["metadata"]["resourceVersion"] == config_map["metadata"]["resourceVersion"]
    )
    assert len(scene.pytorch_jobs()) == 1
    assert api.get("Secret", TLS_SECRET, NAMESPACE)["data"] == secret["data"]
    assert secret["data"]
    assert "newKey" in spec_of(api.get("CustomResourceDefinition", CRD))
    later = Scene(api, kubelet, "later")
    later.apply()
    (container,) = later.pods()[0]["spec"]["containers"]
    assert container["image"] == "finetune-trainer:0.2.0"
    kubelet.succeed(scene.pod(), success())
    assert len(scene.wait_phase("Succeeded").get("attempts", [])) <= 1
    assert operator.forbidden() == []


def test_uninstalled_it_leaves_the_jobs_and_takes_them_over_again(release: Release, scene: Scene) -> None:
    before, child = _identity(scene.job()), scene.child()
    for process in release.operators:
        process.stop()
    said = release.uninstall()
    assert "[CustomResourceDefinition] finetunejobs.finetune.dev" in said
    assert _identity(scene.job()) == before
    assert scene.api.find("PyTorchJob", child)
    assert release.labelled() == {f"CustomResourceDefinition /{CRD}"}
    release.install()
    release.operator()
    assert _identity(scene.job()) == before
    assert [each["metadata"]["name"] for each in scene.pytorch_jobs()] == [child]


def test_uninstalled_without_keeping_jobs_it_leaves_what_the_readme_says(release: Release, kubelet: Kubelet) -> None:
    api = release.plane.api.in_namespace(TEAM)
    api.delete("CustomResourceDefinition", CRD)
    api.wait_gone("CustomResourceDefinition", CRD)
    before = release.everything()
    release.install({**QUICK, "crds": {"keep": False}})
    operator = release.operator()
    scene = Scene(api, kubelet, "guard")
    scene.apply()
    scene.run()
    assert release.everything() > before
    operator.stop()
    release.uninstall()
    wait_until(lambda: release.everything() - before, lambda left: left == {LEFT_BY_THE_OPERATOR}, GARBAGE_SECONDS)
    assert release.everything() >= before
    options = ["--all-namespaces", f"--field-selector=metadata.name={CA_CONFIG_MAP}"]
    assert release.plane.kubectl("delete", "configmap", *options).returncode == 0
    assert release.everything() == before


def test_whoever_may_edit_a_namespace_may_fine_tune_and_whoever_may_view_it_sees(release: Release) -> None:
    release.install(QUICK, TAKE_OVER)
    api = release.plane.api
    for role in ("edit", "view"):
        _bind(api, role)

    def may(role: str, verb: str, namespace: str = TEAM) -> bool:
        options = [f"--as={role}or", "--namespace", namespace]
        return release.plane.kubectl("auth", "can-i", verb, "finetunejobs.finetune.dev", *options).returncode == 0

    wait_until(lambda: may("edit", "create") and may("view", "list"))
    assert all(may("edit", verb) for verb in ("get", "list", "watch", "update", "patch", "delete"))
    assert not any(may("view", verb) for verb in ("create", "update", "patch", "delete"))
    assert not may("edit", "create", TEAMS[1])


def test_its_notes_say_what_is_still_missing(release: Release) -> None:
    without = release.install({"trainer": {"defaultOutputUri": ""}}, TAKE_OVER)
    assert "looks after the FineTuneJobs of all namespaces" in without
    assert "every job has to name its output" in without
    assert "training operator (v1.9) is not installed" not in without


def test_a_second_release_looks_after_another_namespace(release: Release) -> None:
    release.install({**QUICK, "watchNamespaces": [TEAM]}, TAKE_OVER)
    other = Release(release.plane, release.folder / "other", name=f"{RELEASE}-b")
    shared = {"crds": {"install": False}, "rbac": {"aggregateClusterRoles": False}}
    try:
        other.install({**QUICK, **shared, "watchNamespaces": [TEAMS[1]]})
        names = {
            (each["kind"], each["metadata"]["name"], each["metadata"].get("namespace")) for each in other.objects()
        }
        assert ("Role", f"{RELEASE}-b", TEAMS[1]) in names
    finally:
        other.uninstall()


def _bind(api: Api, role: str) -> None:
    api.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": role, "namespace": TEAM},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": f"{role}or"}],
        }
    )
