"""Who may report progress, decided by a real API server over real tokens that are bound to real pods."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import load_kube_config

from finetune_api.outcome import Reason
from finetune_operator.cluster import Cluster
from finetune_operator.errors import Forbidden
from finetune_operator.names import CA_CONFIG_MAP, CA_KEY, MANAGER, TLS_SECRET
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.wire import Wire
from finetune_trainer.train.progress import Endpoint, ProgressReporter
from finetune_trainer.train.progress_status import Phase, Progress, trainer_status
from tests.cluster.api import Api, Object
from tests.cluster.control_plane import OPERATOR_ACCOUNT, OPERATOR_INSTALLATION, OPERATOR_NAMESPACE, ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, failure

T = TypeVar("T")


@dataclass(frozen=True)
class Reporter:
    """Posts to the operator as pods of the test's namespace do."""

    control_plane: ControlPlane
    operator: OperatorProcess
    api: Api
    folder: Path

    def token(self, pod: Object | None, *audiences: str) -> str:
        """What a kubelet projects into `pod`; without one, a token of the account alone."""
        namespace = self.api.namespace or ""
        return self.control_plane.token(namespace, "default", audiences=audiences or (MANAGER,), pod=pod)

    def endpoint(self, token: str) -> Endpoint:
        """The endpoint as a pod's files and variables name it."""
        token_path, ca_path = self.folder / "token", self.folder / CA_KEY
        token_path.write_text(token)
        ca_path.write_text(self.api.get("ConfigMap", CA_CONFIG_MAP)["data"][CA_KEY])
        return Endpoint(self.operator.progress_url, token_path, ca_path)

    def post(self, token: str, percent: int) -> int:
        """Post once; the HTTP status of the answer."""
        progress = Progress(phase=Phase.RUNNING, percent=percent, step=percent, total_steps=100)
        try:
            self.endpoint(token).post(trainer_status(progress, datetime.now(UTC)))
        except httpx.HTTPStatusError as error:
            return error.response.status_code
        return 200


@pytest.fixture
def reporter(control_plane: ControlPlane, operator: OperatorProcess, api: Api, tmp_path: Path) -> Reporter:
    return Reporter(control_plane, operator, api, tmp_path)


def test_the_trainer_of_the_first_worker_moves_the_progress_in_status(
    reporter: Reporter, api: Api, kubelet: Kubelet
) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply(workers={"nodes": 2, "gpusPerNode": 0})
    first, _ = scene.run(count=2)

    trainer = ProgressReporter(reporter.endpoint(reporter.token(first)), interval_seconds=0)
    trainer.start()
    trainer.update(Progress(phase=Phase.RUNNING, percent=25, step=2, total_steps=8, loss=1.25))
    job = api.wait("FineTuneJob", "guard", lambda job: job["status"].get("progress", {}).get("percent") == 25)
    trainer.close()

    progress = job["status"]["progress"]
    assert (progress["step"], progress["totalSteps"], progress["loss"]) == (2, 8, 1.25)
    assert "etaSeconds" not in progress
    assert job["status"]["phase"] == "Running"


def test_tokens_that_are_wrong_foreign_or_missing_change_nothing(
    reporter: Reporter, api: Api, kubelet: Kubelet
) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply(workers={"nodes": 2, "gpusPerNode": 0})
    first, second = scene.run(count=2)
    impostor = api.create(_dressed_up_as(first, "impostor"))
    deleted = api.create(_dressed_up_as(first, "deleted"))
    token_of_deleted = reporter.token(deleted)
    api.delete("Pod", "deleted", grace_seconds=0)
    api.wait_gone("Pod", "deleted")
    good = reporter.token(first)

    answers = {
        "garbage": reporter.post("garbage", 1),
        "tampered": reporter.post(f"{good[:-8]}AAAAAAAA", 2),
        "for the API server": reporter.post(reporter.token(first, "https://kubernetes.default.svc"), 3),
        "of no pod": reporter.post(reporter.token(None), 4),
        "of the second worker": reporter.post(reporter.token(second), 5),
        "of a pod with a worker's labels": reporter.post(reporter.token(impostor), 6),
        "of a deleted pod": reporter.post(token_of_deleted, 7),
    }
    assert answers == {
        "garbage": 401,
        "tampered": 401,
        "for the API server": 401,
        "of no pod": 403,
        "of the second worker": 403,
        "of a pod with a worker's labels": 403,
        "of a deleted pod": 401,
    }
    without = httpx.post(reporter.operator.progress_url, verify=_trust(reporter), json={}, trust_env=False)
    assert without.status_code == 401
    assert "progress" not in scene.status()

    assert reporter.post(good, 50) == 200
    job = api.wait("FineTuneJob", "guard", lambda job: "progress" in job["status"])
    assert job["status"]["progress"]["percent"] == 50
    assert good not in reporter.operator.log()


def test_a_pod_of_an_earlier_attempt_reports_no_more(reporter: Reporter, api: Api, kubelet: Kubelet) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply()
    (pod,) = scene.run()
    earlier = reporter.token(pod)
    assert reporter.post(earlier, 40) == 200
    kubelet.fail(pod, 204, failure(Reason.INTERNAL_ERROR))
    (pod,) = scene.run(attempt=2)

    # The operator may still remember whose the token is, though the API server knows no such pod any more.
    assert reporter.post(earlier, 45) in (401, 403)
    assert "percent" not in scene.status().get("progress", {})
    assert reporter.post(reporter.token(pod), 5) == 200
    job = api.wait("FineTuneJob", "guard", lambda job: "percent" in job["status"].get("progress", {}))
    assert job["status"]["progress"]["percent"] == 5


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

    bundles = _with_cluster(control_plane.admin_kubeconfig, start_all)
    assert len(set(bundles)) == 1
    assert api.get("ConfigMap", CA_CONFIG_MAP)["data"] == {CA_KEY: bundles[0].decode()}


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

    _with_cluster(control_plane.kubeconfig(OPERATOR_NAMESPACE, OPERATOR_ACCOUNT), attempt)


def test_applying_the_permissions_again_keeps_the_authority(control_plane: ControlPlane, operator: object) -> None:
    secret = control_plane.api.get("Secret", TLS_SECRET, OPERATOR_NAMESPACE)
    assert secret["data"].keys() == {CA_KEY, "ca.key"}
    for arguments in (["--server-side", "--force-conflicts"], []):
        done = control_plane.kubectl("apply", *arguments, "-f", OPERATOR_INSTALLATION)
        assert done.returncode == 0, done.stderr
    assert control_plane.api.get("Secret", TLS_SECRET, OPERATOR_NAMESPACE)["data"] == secret["data"]


def _with_cluster(kubeconfig: Path, use: Callable[[Cluster], Awaitable[T]]) -> T:
    async def run() -> T:
        configuration = Configuration()
        load: Any = load_kube_config  # not typed
        await load(config_file=str(kubeconfig), client_configuration=configuration)
        async with Cluster(Wire(configuration)) as cluster:
            return await use(cluster)

    return asyncio.run(run())


def _dressed_up_as(worker: Object, name: str) -> Object:
    """A pod that somebody made by hand with the labels of a job's worker."""
    metadata = {"name": name, "labels": worker["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": _plain(worker["spec"])}


def _plain(spec: Object) -> Object:
    return {key: spec[key] for key in ("containers", "securityContext", "restartPolicy", "volumes") if key in spec}


def _trust(reporter: Reporter) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=reporter.endpoint("").ca_cert_path)
