"""A namespace is deleted under its jobs, or taken away from the operator: the others never notice.

An operator for one namespace alone has all the rights it needs.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.cluster.api import Api, Object, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import OPERATOR_NAMESPACE, ROOT, ControlPlane, operator_rights
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, success
from tests.faults.fault_proxy import run_fault_proxy
from tests.faults.faults import Refusal

RIGHTS = ROOT / "dist" / "install-one-namespace.yaml"
BOUND = ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")


@pytest.fixture
def other(control_plane: ControlPlane) -> str:
    """A second namespace."""
    name = f"other-{secrets.token_hex(4)}"
    control_plane.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    control_plane.api.wait("ServiceAccount", "default", bool, namespace=name)
    return name


def test_a_namespace_can_be_deleted_under_running_jobs(
    operator_factory: OperatorFactory, control_plane: ControlPlane, other: str, api: Api, kubelet: Kubelet
) -> None:
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


@contextmanager
def new_account(control_plane: ControlPlane, *namespaces: str) -> Iterator[str]:
    """A service account with the published rights for single namespaces."""
    name = f"one-namespace-{secrets.token_hex(4)}"
    documents = [_renamed(document, name, place) for place in namespaces for document in operator_rights(RIGHTS)]
    wanted = [document for document in documents if document["kind"] in (*BOUND, "ServiceAccount")]
    control_plane.apply(wanted)
    yield name
    for document in wanted:
        metadata = document["metadata"]
        control_plane.api.delete(document["kind"], metadata["name"], metadata.get("namespace", OPERATOR_NAMESPACE))


@pytest.fixture
def account(control_plane: ControlPlane, namespace: str) -> Iterator[str]:
    """One for the test's namespace."""
    with new_account(control_plane, namespace) as name:
        yield name


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


def _works_and_is_ready(operator: OperatorProcess, scene: Scene) -> None:
    """A new job gets through its whole life."""
    scene.apply()
    pods = scene.run()
    scene.kubelet.succeed(pods[0], success())
    scene.wait_phase("Succeeded")
    for probe in ("readyz", "healthz"):
        # Within three resyncs at the latest it would say so.
        since = _resyncs(operator)
        wait_until(lambda: _resyncs(operator) >= since + 3)  # noqa: B023
        answer = httpx.get(f"{operator.health_url}/{probe}", trust_env=False)
        assert (answer.status_code, answer.text) == (200, "ok\n"), probe


def _resyncs(operator: OperatorProcess) -> int:
    return sum(request.verb == "list" and request.resource == "finetunejobs" for request in operator.requests())


def test_one_of_several_namespaces_can_be_deleted_and_the_others_never_notice(
    operator_factory: OperatorFactory,
    control_plane: ControlPlane,
    namespace: str,
    other: str,
    kubelet: Kubelet,
    api: Api,
    tmp_path: Path,
) -> None:
    doomed, scene = Scene(control_plane.api.in_namespace(other), kubelet, "guard"), Scene(api, kubelet, "guard")
    with new_account(control_plane, namespace, other) as account:
        settings = {"watch_namespaces": [other, namespace], "resync_seconds": 1}
        operator = OperatorProcess(control_plane, tmp_path / "operator", settings, account=account)
        operator.start()
        doomed.apply()
        assert api.wait("PyTorchJob", doomed.child(), bool, namespace=other)
        # With it goes the operator's right to look into it.
        control_plane.api.delete("Namespace", other)
        control_plane.api.wait_gone("Namespace", other)
        wait_until(operator.forbidden)
        _works_and_is_ready(operator, scene)
        operator.restart()
        _works_and_is_ready(operator, Scene(api, kubelet, "later"))
        operator.stop()


@pytest.mark.parametrize(
    "refusal", [Refusal(403, "is forbidden"), Refusal(404), Refusal(404, body=b"404 page not found"), Refusal(503)]
)
def test_a_namespace_that_cannot_be_read_holds_up_no_other(
    operator_factory: OperatorFactory,
    control_plane: ControlPlane,
    namespace: str,
    kubelet: Kubelet,
    api: Api,
    refusal: Refusal,
    tmp_path: Path,
) -> None:
    with run_fault_proxy(control_plane, tmp_path) as proxy:
        proxy.refuse = lambda call: refusal if call.namespace == "lost" else None
        operator = operator_factory(server=proxy.url, watch_namespaces=["lost", namespace], resync_seconds=1)
        operator.start()
        _works_and_is_ready(operator, Scene(api, kubelet, "guard"))
        operator.stop()
