"""A namespace is deleted under its jobs, and an operator for one namespace alone has all the rights it needs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.cluster.api import Api, Object, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import OPERATOR_NAMESPACE, ROOT, ControlPlane, operator_rights
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, success

RIGHTS = ROOT / "dist" / "install-one-namespace.yaml"
BOUND = ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")


def test_a_namespace_can_be_deleted_under_running_jobs(
    operator_factory: OperatorFactory, control_plane: ControlPlane, api: Api, kubelet: Kubelet
) -> None:
    other = f"other-{secrets.token_hex(4)}"
    control_plane.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    control_plane.api.wait("ServiceAccount", "default", bool, namespace=other)
    operator = operator_factory(watch_namespaces=None)
    operator.start()
    doomed, scene = Scene(control_plane.api.in_namespace(other), kubelet, "guard"), Scene(api, kubelet, "guard")
    doomed.apply()
    scene.apply()
    scene.run()
    assert api.wait("PyTorchJob", doomed.child(), bool, namespace=other)
    control_plane.api.delete("Namespace", other)
    control_plane.api.wait_gone("Namespace", other)
    kubelet.succeed(scene.pod(), success())
    scene.wait_phase("Succeeded")
    wait_until(lambda: 'finetune_jobs{phase="Succeeded"} 1.0' in operator.metrics())
    wait_until(lambda: operator.metrics().count("finetune_queue_depth 0.0"))
    assert operator.running


@pytest.fixture
def account(control_plane: ControlPlane, namespace: str) -> Iterator[str]:
    """A service account with the published rights for one namespace, which is the test's."""
    name = f"one-namespace-{secrets.token_hex(4)}"
    documents = [_renamed(document, name, namespace) for document in operator_rights(RIGHTS)]
    wanted = [document for document in documents if document["kind"] in (*BOUND, "ServiceAccount")]
    control_plane.apply(wanted)
    yield name
    for document in wanted:
        metadata = document["metadata"]
        control_plane.api.delete(document["kind"], metadata["name"], metadata.get("namespace", OPERATOR_NAMESPACE))


def _renamed(document: Object, account: str, namespace: str) -> Object:
    """The same for an account of another name and for another namespace."""
    metadata = {**document["metadata"]}
    if document["kind"] in BOUND:
        metadata["name"] = f"{account}-{metadata['name']}"
    if document["kind"] == "ServiceAccount":
        metadata["name"] = account
    if metadata.get("namespace") == "finetune-jobs":
        metadata["namespace"] = namespace
    renamed = {**document, "metadata": metadata}
    if "roleRef" in document:
        renamed["roleRef"] = {**document["roleRef"], "name": f"{account}-{document['roleRef']['name']}"}
        renamed["subjects"] = [{**subject, "name": account} for subject in document["subjects"]]
    return renamed


def test_an_operator_for_one_namespace_needs_no_other_rights(
    account: str, operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    operator = operator_factory(account=account)
    operator.start()
    scene = Scene(api, kubelet, "guard")
    scene.apply(ttlSecondsAfterFinished=0)
    scene.run()
    scene.api.delete("PyTorchJob", scene.child())
    scene.wait_attempts("WorkersDeleted")
    scene.run(attempt=2)
    scene.change(suspend=True)
    scene.wait_attempts("WorkersDeleted", "Suspended")
    scene.change(suspend=False)
    scene.run(attempt=3)
    kubelet.succeed(scene.pod(attempt=3), success())
    api.wait_gone("FineTuneJob", scene.name)
    assert operator.forbidden() == []
    assert any(request.resource == "finetunejobs" and request.verb == "watch" for request in operator.requests())
