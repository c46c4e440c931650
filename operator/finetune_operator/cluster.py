"""The only module with a Kubernetes client: every request that the operator makes itself, as raw objects.

The client library finds the API server and proves who we are; objects stay JSON, because turning thousands of pods
into classes costs more than everything else here. Requests are never repeated here: whoever asked decides anew.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote, urlencode

import aiohttp
import orjson
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from finetune_operator.errors import NotFound, api_error
from finetune_operator.names import (
    ATTEMPT_LABEL,
    BATCH_GROUP,
    BATCH_PLURAL,
    BATCH_VERSION,
    CONTROLLER_UID_LABEL,
    FINETUNE_GROUP,
    FINETUNE_PLURAL,
    FINETUNE_VERSION,
    JOB_UID_LABEL,
    PYTORCH_GROUP,
    PYTORCH_PLURAL,
    PYTORCH_VERSION,
)

Raw = dict[str, Any]

REQUEST_TIMEOUT_SECONDS = 30.0
CONNECTIONS = 32
PAGE = 100
"""Objects per page of a list: bounds what API server and operator hold at once."""

JOBS = f"apis/{FINETUNE_GROUP}/{FINETUNE_VERSION}"
BATCH_JOBS = f"apis/{BATCH_GROUP}/{BATCH_VERSION}"
PYTORCH_JOBS = f"apis/{PYTORCH_GROUP}/{PYTORCH_VERSION}"


@dataclass(frozen=True)
class Credentials:
    """How to reach the API server, for watches that somebody else keeps."""

    server: str
    ca_path: str | None
    insecure: bool
    token: str | None = field(repr=False)
    certificate_path: str | None
    private_key_path: str | None


class Cluster:
    """Requests to the API server; every method may raise an `errors.ApiError`. Use as `async with`."""

    def __init__(self, configuration: Configuration, *, timeout_seconds: float = REQUEST_TIMEOUT_SECONDS) -> None:
        self._configuration = configuration
        self._client: ApiClient | None = None
        self._timeout_seconds = timeout_seconds

    @classmethod
    async def connect(cls) -> Self:
        """A cluster as the pod's service account or the kubeconfig names it.

        Raises:
            ConfigException: there is neither.
        """
        configuration = Configuration()
        try:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call] # the client's
        except ConfigException:
            await load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call] # the client's
        configuration.connection_pool_maxsize = CONNECTIONS
        # Or aiohttp reads ~/.netrc before every request, in a thread. kopf's watches do without as well.
        configuration.client_session_kwargs = {"trust_env": False}
        return cls(configuration)

    async def __aenter__(self) -> Self:
        self._client = ApiClient(self._configuration)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._client is not None:
            await self._client.close()  # type: ignore[no-untyped-call] # the client's

    async def credentials(self) -> Credentials:
        """The present ones; a pod's token changes every hour."""
        configuration = self._configuration
        header = await configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        return Credentials(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            token=header.rpartition(" ")[2] if header else None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )

    async def missing_kinds(self) -> set[str]:
        """Plurals of the kinds of jobs that are not installed. Others may be there in their groups."""
        missing = set()
        for api, plural in ((JOBS, FINETUNE_PLURAL), (PYTORCH_JOBS, PYTORCH_PLURAL)):
            found = await self._get(api)
            if plural not in {item.get("name") for item in (found or {}).get("resources") or ()}:
                missing.add(plural)
        return missing

    # FineTuneJobs

    async def get_job(self, namespace: str, name: str) -> Raw | None:
        """The FineTuneJob, or None."""
        return await self._get(_path(JOBS, namespace, FINETUNE_PLURAL, name))

    def list_jobs(self, namespace: str | None) -> AsyncIterator[Raw]:
        """All FineTuneJobs of a namespace, or of all."""
        return self._list(_path(JOBS, namespace, FINETUNE_PLURAL), {})

    async def update_job_status(self, job: Mapping[str, Any]) -> Raw:
        """Write the status of `job`, which carries the resourceVersion that it was read at."""
        metadata = job["metadata"]
        path = _path(JOBS, metadata["namespace"], FINETUNE_PLURAL, metadata["name"], "status")
        return await self._request("PUT", path, body=job)

    async def delete_job(self, job: Mapping[str, Any]) -> None:
        """Delete `job` if it is still the one that was read."""
        metadata = job["metadata"]
        path = _path(JOBS, metadata["namespace"], FINETUNE_PLURAL, metadata["name"])
        await self._delete(path, uid=metadata["uid"], resource_version=metadata["resourceVersion"])

    # PyTorchJobs and their pods

    async def get_pytorch_job(self, namespace: str, name: str) -> Raw | None:
        """The PyTorchJob, or None; None as well when its kind is not installed."""
        return await self._get(_path(PYTORCH_JOBS, namespace, PYTORCH_PLURAL, name))

    def list_pytorch_jobs(self, namespace: str | None) -> AsyncIterator[Raw]:
        """All PyTorchJobs of ours in a namespace, or in all."""
        return self._list(_path(PYTORCH_JOBS, namespace, PYTORCH_PLURAL), {"labelSelector": JOB_UID_LABEL})

    async def create_pytorch_job(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create a PyTorchJob."""
        return await self._request("POST", _path(PYTORCH_JOBS, namespace, PYTORCH_PLURAL), body=body)

    async def delete_pytorch_job(self, namespace: str, name: str, *, uid: str) -> None:
        """Delete the PyTorchJob with that uid; its pods and services follow."""
        await self._delete(_path(PYTORCH_JOBS, namespace, PYTORCH_PLURAL, name), uid=uid)

    async def get_pod(self, namespace: str, name: str) -> Raw | None:
        """The pod, or None."""
        return await self._get(_path("api/v1", namespace, "pods", name))

    def list_pods(self, namespace: str, *, job_uid: str, attempt: int) -> AsyncIterator[Raw]:
        """The pods of one attempt, wherever they come from."""
        selector = f"{JOB_UID_LABEL}={job_uid},{ATTEMPT_LABEL}={attempt}"
        return self._list(_path("api/v1", namespace, "pods"), {"labelSelector": selector})

    # Jobs that verify adapters, and their pods

    async def get_batch_job(self, namespace: str, name: str) -> Raw | None:
        """The batch Job, or None."""
        return await self._get(_path(BATCH_JOBS, namespace, BATCH_PLURAL, name))

    async def create_batch_job(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create a batch Job."""
        return await self._request("POST", _path(BATCH_JOBS, namespace, BATCH_PLURAL), body=body)

    def list_batch_job_pods(self, namespace: str, *, uid: str) -> AsyncIterator[Raw]:
        """The pods of the batch Job with that uid."""
        return self._list(_path("api/v1", namespace, "pods"), {"labelSelector": f"{CONTROLLER_UID_LABEL}={uid}"})

    # What belongs to an attempt, and what belongs to the operator

    async def get_config_map(self, namespace: str, name: str) -> Raw | None:
        """The ConfigMap, or None."""
        return await self._get(_path("api/v1", namespace, "configmaps", name))

    async def create_config_map(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create a ConfigMap."""
        return await self._request("POST", _path("api/v1", namespace, "configmaps"), body=body)

    async def update_config_map(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Replace a ConfigMap that was read before."""
        path = _path("api/v1", namespace, "configmaps", body["metadata"]["name"])
        return await self._request("PUT", path, body=body)

    async def delete_config_map(self, namespace: str, name: str, *, uid: str) -> None:
        """Delete the ConfigMap with that uid."""
        await self._delete(_path("api/v1", namespace, "configmaps", name), uid=uid)

    async def get_secret(self, namespace: str, name: str) -> Raw | None:
        """The Secret, or None."""
        return await self._get(_path("api/v1", namespace, "secrets", name))

    async def create_secret(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create a Secret."""
        return await self._request("POST", _path("api/v1", namespace, "secrets"), body=body)

    async def update_secret(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Replace a Secret that was read before."""
        path = _path("api/v1", namespace, "secrets", body["metadata"]["name"])
        return await self._request("PUT", path, body=body)

    async def review_token(self, token: str, audience: str) -> Raw:
        """The status of a TokenReview of `token` for `audience`."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self._request("POST", "apis/authentication.k8s.io/v1/tokenreviews", body=body)
        status = answer.get("status")
        return status if isinstance(status, dict) else {}

    async def create_event(self, namespace: str, body: Mapping[str, Any]) -> None:
        """Post an event."""
        await self._request("POST", _path("api/v1", namespace, "events"), body=body)

    # The wire

    async def _get(self, path: str) -> Raw | None:
        try:
            return await self._request("GET", path)
        except NotFound:
            return None

    async def _delete(self, path: str, *, uid: str, resource_version: str | None = None) -> None:
        preconditions = {"uid": uid} | ({"resourceVersion": resource_version} if resource_version else {})
        body = {"propagationPolicy": "Background", "preconditions": preconditions}
        try:
            await self._request("DELETE", path, body=body)
        except NotFound:
            return

    async def _list(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Raw]:
        token = ""
        while True:
            page = {**query, "limit": str(PAGE)} | ({"continue": token} if token else {})
            answer = await self._request("GET", path, query=page)
            for item in answer.get("items") or ():
                yield item
            token = (answer.get("metadata") or {}).get("continue") or ""
            if not token:
                return

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Raw:
        session = self._session()
        url = f"{self._configuration.host.rstrip('/')}/{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": "application/json"}
        authorization = await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if authorization:
            headers["Authorization"] = authorization
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with session.request(
                method,
                url,
                data=orjson.dumps(body) if body is not None else None,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self._timeout_seconds),
            ) as answer:
                content = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise api_error(None, type(error).__name__, f"The API server gave no answer ({_text(error)}).") from error
        if answer.status >= 400:
            raise _refusal(answer, content)
        return _object(content)

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            raise RuntimeError("The cluster is used outside of `async with`.")
        rest = self._client.rest_client
        if rest.pool_manager is None:
            rest.pool_manager = rest._create_pool_manager()  # noqa: SLF001  made lazily there too, on the first request
        session: aiohttp.ClientSession = rest.pool_manager
        return session


def _path(api: str, namespace: str | None, *parts: str) -> str:
    within = f"namespaces/{quote(namespace, safe='')}/" if namespace else ""
    return f"{api}/{within}" + "/".join(quote(part, safe="") for part in parts)


def _object(content: bytes) -> Raw:
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise api_error(None, "Garbled", "The API server's answer cannot be read.") from error
    return found if isinstance(found, dict) else {}


def _refusal(answer: aiohttp.ClientResponse, content: bytes) -> Exception:
    try:
        status = orjson.loads(content)
    except orjson.JSONDecodeError:
        status = {}
    status = status if isinstance(status, dict) else {}
    wait = answer.headers.get("Retry-After", "")
    return api_error(
        answer.status,
        str(status.get("reason") or ""),
        str(status.get("message") or f"{answer.status} {answer.reason}"),
        float(wait) if wait.isdecimal() else None,
    )


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
