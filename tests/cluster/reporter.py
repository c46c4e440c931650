"""Posts progress to an operator as the pods of a namespace do: with tokens that the real API server has signed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import load_kube_config

from finetune_operator.cluster import Cluster
from finetune_operator.names import CA_CONFIG_MAP, CA_KEY, MANAGER
from finetune_operator.wire import Wire
from finetune_trainer.train.progress import Endpoint
from finetune_trainer.train.progress_status import Phase, Progress, trainer_status
from tests.cluster.api import Api, Object
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator_process import OperatorProcess

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
        namespace = pod["metadata"]["namespace"] if pod else self.api.namespace or ""
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

    def trust(self) -> ssl.SSLContext:
        """What a pod of the namespace trusts."""
        return ssl.create_default_context(cafile=self.endpoint("").ca_cert_path)

    def reviews(self, since: int) -> int:
        """Tokens that the operator has asked the API server about, behind a position of the audit log."""
        return sum(request.resource == "tokenreviews" for request in self.operator.requests(since))


def with_cluster(kubeconfig: Path, use: Callable[[Cluster], Awaitable[T]]) -> T:
    """What `use` returns, given the operator's own client with those credentials."""

    async def run() -> T:
        configuration = Configuration()
        load: Any = load_kube_config  # not typed
        await load(config_file=str(kubeconfig), client_configuration=configuration)
        async with Cluster(Wire(configuration)) as cluster:
            return await use(cluster)

    return asyncio.run(run())


def dressed_up_as(worker: Object, name: str) -> Object:
    """A pod that somebody made by hand with the labels of a job's worker."""
    kept = ("containers", "securityContext", "restartPolicy", "volumes")
    spec = {key: worker["spec"][key] for key in kept if key in worker["spec"]}
    metadata = {"name": name, "labels": worker["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
