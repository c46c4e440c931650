"""The progress endpoint's certificate reaches the jobs' namespaces, and whatever keeps it from there stops no job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from finetune_operator.cluster import Cluster
from finetune_operator.errors import Forbidden
from finetune_operator.names import CA_CONFIG_MAP, CA_KEY, MANAGED_BY_LABEL, MANAGER, TLS_SECRET
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.bundle import bundle_key
from tests.cluster.api import Api, Object, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.control_plane import OPERATOR_ACCOUNT, OPERATOR_INSTALLATION, OPERATOR_NAMESPACE, ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.reporter import Reporter, with_cluster
from tests.cluster.scene import Scene
from tests.processes import unused_port


@pytest.mark.parametrize("prepared", [False, True])
def test_two_operators_that_start_at_once_share_one_authority(
    control_plane: ControlPlane, api: Api, namespace: str, prepared: bool
) -> None:
    if prepared:
        api.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": TLS_SECRET}})

    async def start(cluster: Cluster) -> bytes:
        authority = CertificateAuthority(cluster, namespace=namespace, secret=TLS_SECRET, config_map=CA_CONFIG_MAP)
        await authority.ensure_ca(namespace)
        return (await authority.load()).bundle

    async def start_all(cluster: Cluster) -> list[bytes]:
        return await asyncio.gather(*(start(cluster) for _ in range(8)))

    bundles = with_cluster(control_plane.admin_kubeconfig, start_all)
    assert len(set(bundles)) == 1
    certificates = bundles[0].decode()
    assert api.get("ConfigMap", CA_CONFIG_MAP)["data"] == {
        CA_KEY: certificates,
        bundle_key(namespace, TLS_SECRET): certificates,
    }


def test_the_operators_account_reads_and_writes_one_secret_and_no_other(control_plane: ControlPlane) -> None:
    async def attempt(cluster: Cluster) -> None:
        own = await cluster.get_secret(OPERATOR_NAMESPACE, TLS_SECRET)
        assert own is not None
        await cluster.update_secret(OPERATOR_NAMESPACE, own)
        body: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": TLS_SECRET}}
        for refused in (
            cluster.get_secret(OPERATOR_NAMESPACE, "other"),
            cluster.get_secret("default", TLS_SECRET),
            cluster.create_secret(OPERATOR_NAMESPACE, body),
            cluster.update_secret("default", body),
        ):
            with pytest.raises(Forbidden):
                await refused

    with_cluster(control_plane.kubeconfig(OPERATOR_NAMESPACE, OPERATOR_ACCOUNT), attempt)


def test_applying_the_permissions_again_keeps_the_authority(control_plane: ControlPlane, operator: object) -> None:
    secret = control_plane.api.get("Secret", TLS_SECRET, OPERATOR_NAMESPACE)
    assert secret["data"].keys() == {CA_KEY, "ca.key"}
    for arguments in (["--server-side", "--force-conflicts"], []):
        done = control_plane.kubectl("apply", *arguments, "-f", OPERATOR_INSTALLATION)
        assert done.returncode == 0, done.stderr
    assert control_plane.api.get("Secret", TLS_SECRET, OPERATOR_NAMESPACE)["data"] == secret["data"]


def config_map(**more: Object | bool) -> Object:
    metadata = {"name": CA_CONFIG_MAP, "labels": {MANAGED_BY_LABEL: MANAGER}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {CA_KEY: "older"}, **more}


@contextmanager
def nothing(control_plane: ControlPlane, namespace: str) -> Iterator[None]:
    yield


@contextmanager
def webhook_that_does_not_answer(control_plane: ControlPlane, namespace: str) -> Iterator[None]:
    """Somebody's webhook about this one ConfigMap."""
    name = f"silent-{namespace}"
    webhook = {
        "name": "silent.example.com",
        "clientConfig": {"url": f"https://127.0.0.1:{unused_port()}/"},
        "rules": [
            {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"], "resources": ["configmaps"]}
        ],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "matchConditions": [{"name": "name", "expression": f"request.name == '{CA_CONFIG_MAP}'"}],
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": 1,
    }
    kind = "ValidatingWebhookConfiguration"
    api_version = "admissionregistration.k8s.io/v1"
    control_plane.api.create(
        {"apiVersion": api_version, "kind": kind, "metadata": {"name": name}, "webhooks": [webhook]}
    )
    try:
        yield
    finally:
        control_plane.api.delete(kind, name)


def immutable(api: Api) -> None:
    api.create(config_map(immutable=True))


def foreign(api: Api) -> None:
    api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CA_CONFIG_MAP}, "data": {"mine": "1"}})


def contradictory(api: Api) -> None:
    """What is written under a key in text cannot be there in bytes as well."""
    api.create({**config_map(), "data": {}, "binaryData": {CA_KEY: "AAAA"}})


@pytest.mark.parametrize(
    ("around", "prepare", "said"),
    [
        pytest.param(nothing, immutable, "is immutable and does not hold the present certificates", id="immutable"),
        pytest.param(nothing, foreign, "exists and is not the operator's", id="foreign"),
        pytest.param(nothing, contradictory, "is refused by the API server", id="422"),
        pytest.param(webhook_that_does_not_answer, lambda api: None, "cannot be written now", id="webhook"),
    ],
)
def test_a_job_starts_whatever_keeps_the_certificate_from_its_namespace_and_the_log_says_what(
    control_plane: ControlPlane,
    operator_factory: OperatorFactory,
    api: Api,
    kubelet: Kubelet,
    namespace: str,
    around: Callable[[ControlPlane, str], AbstractContextManager[None]],
    prepare: Callable[[Api], None],
    said: str,
) -> None:
    operator = operator_factory()
    operator.start()
    with around(control_plane, namespace):
        prepare(api)
        # Until the webhook is known everywhere, the ConfigMap may be made before it.
        for name in ("first", "second", "third"):
            scene = Scene(api, kubelet, name)
            scene.apply()
            scene.run()
    written = [request for request in operator.writes() if request.name == CA_CONFIG_MAP]
    assert f"ConfigMap {namespace}/{CA_CONFIG_MAP} {said}" in operator.log()
    # One try for three jobs.
    assert len(written) <= 1


def test_two_installations_with_one_namespace_are_both_trusted(
    control_plane: ControlPlane, api: Api, namespace: str
) -> None:
    secrets = ("one-tls", "other-tls")
    for secret in secrets:
        api.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}})

    async def use(cluster: Cluster) -> list[str]:
        authorities = [
            CertificateAuthority(cluster, namespace=namespace, secret=secret, config_map=CA_CONFIG_MAP)
            for secret in secrets
        ]
        await asyncio.gather(*(authority.ensure_ca(namespace) for authority in authorities))
        return [(await authority.load()).bundle.decode() for authority in authorities]

    bundles = with_cluster(control_plane.admin_kubeconfig, use)
    before = api.get("ConfigMap", CA_CONFIG_MAP)
    assert all(bundle in before["data"][CA_KEY] for bundle in bundles)
    assert with_cluster(control_plane.admin_kubeconfig, use) == bundles
    after = api.get("ConfigMap", CA_CONFIG_MAP)
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


def test_after_a_new_installation_a_pod_that_runs_trusts_it_once_its_namespace_was_told(
    control_plane: ControlPlane, operator_factory: OperatorFactory, api: Api, kubelet: Kubelet, tmp_path: Path
) -> None:
    secret = control_plane.api.get("Secret", TLS_SECRET, OPERATOR_NAMESPACE)
    operator = operator_factory()
    operator.start()
    scene = Scene(api, kubelet, "guard")
    scene.apply()
    (pod,) = scene.run()
    reporter = Reporter(control_plane, operator, api, tmp_path)
    token = reporter.token(pod)
    assert reporter.post(token, 10) == 200
    operator.stop()
    control_plane.api.patch("Secret", TLS_SECRET, {"data": None}, namespace=OPERATOR_NAMESPACE)
    try:
        operator.start()
        wait_until(lambda: reporter.post(token, 20), lambda status: status == 200)
    finally:
        operator.stop()
        control_plane.api.patch("Secret", TLS_SECRET, {"data": secret["data"]}, namespace=OPERATOR_NAMESPACE)
