"""Every request that the operator makes itself, as raw objects. How they travel is `wire`'s."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

from finetune_operator.errors import NotFound
from finetune_operator.names import (
    ATTEMPT_LABEL,
    BATCH_GROUP,
    BATCH_PLURAL,
    BATCH_VERSION,
    CONTROLLER_UID_LABEL,
    FINETUNE_GROUP,
    FINETUNE_PLURAL,
    FINETUNE_VERSION,
    JOB_NAME_LABEL,
    JOB_UID_LABEL,
    PODS_PLURAL,
    PYTORCH_GROUP,
    PYTORCH_PLURAL,
    PYTORCH_VERSION,
)
from finetune_operator.policy.observed import controller_of
from finetune_operator.wire import METADATA, METADATA_LIST, Raw, Wire, api_path, checked

FINETUNE_API = f"apis/{FINETUNE_GROUP}/{FINETUNE_VERSION}"
BATCH_API = f"apis/{BATCH_GROUP}/{BATCH_VERSION}"
PYTORCH_API = f"apis/{PYTORCH_GROUP}/{PYTORCH_VERSION}"
CORE_API = "api/v1"

LIVE_PODS = "status.phase!=Succeeded,status.phase!=Failed"
"""Selects pods that have not ended. One that ends leaves the selection, which a watch tells as its deletion."""


class Cluster:
    """Requests to the API server; every method may raise an `errors.ApiError`. Use as `async with`."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    @classmethod
    async def connect(cls) -> Self:
        """A cluster as the pod's service account or the kubeconfig names it.

        Raises:
            SetupProblem: there is neither.
        """
        return cls(await Wire.connect())

    async def __aenter__(self) -> Self:
        await self.wire.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.wire.__aexit__(*exc_info)

    async def minor_version(self) -> int:
        """The API server's minor version; 0 where it does not tell."""
        digits = str((await self.wire.request("GET", "version")).get("minor") or "")
        return int(digits.rstrip("+")) if digits.rstrip("+").isdecimal() else 0

    async def missing_kinds(self) -> set[str]:
        """Plurals of the kinds of jobs that are not installed. Others may be there in their groups."""
        missing = set()
        for api, plural in ((FINETUNE_API, FINETUNE_PLURAL), (PYTORCH_API, PYTORCH_PLURAL)):
            if plural not in await self._plurals(api):
                missing.add(plural)
        return missing

    # FineTuneJobs

    async def get_job(self, namespace: str, name: str) -> Raw | None:
        """The FineTuneJob, or None."""
        return await self._get(api_path(FINETUNE_API, namespace, FINETUNE_PLURAL, name))

    async def update_job_status(self, job: Raw, status: Mapping[str, Any]) -> Raw:
        """Write the status of `job` if it is still the one that was read; its new metadata.

        The server keeps everything else, so nothing else is sent.
        """
        metadata = {key: job["metadata"][key] for key in ("namespace", "name", "uid", "resourceVersion")}
        body = {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": metadata, "status": status}
        path = api_path(FINETUNE_API, metadata["namespace"], FINETUNE_PLURAL, metadata["name"], "status")
        return checked(await self.wire.request("PUT", path, body=body, accept=METADATA))

    async def delete_job(self, job: Mapping[str, Any]) -> None:
        """Delete `job` if it is still the one that was read."""
        metadata = job["metadata"]
        path = api_path(FINETUNE_API, metadata["namespace"], FINETUNE_PLURAL, metadata["name"])
        await self._delete(path, uid=metadata["uid"], resource_version=metadata["resourceVersion"])

    # PyTorchJobs and their pods

    async def get_pytorch_job(self, namespace: str, name: str) -> Raw | None:
        """The PyTorchJob, or None; None as well when its kind is not installed."""
        return await self._get(api_path(PYTORCH_API, namespace, PYTORCH_PLURAL, name))

    async def create_pytorch_job(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create a PyTorchJob."""
        return checked(await self.wire.request("POST", api_path(PYTORCH_API, namespace, PYTORCH_PLURAL), body=body))

    async def delete_pytorch_job(self, namespace: str, name: str, *, uid: str) -> None:
        """Delete the PyTorchJob with that uid; its pods and services follow."""
        await self._delete(api_path(PYTORCH_API, namespace, PYTORCH_PLURAL, name), uid=uid)

    async def get_pod(self, namespace: str, name: str) -> Raw | None:
        """The pod, or None."""
        return await self._get(api_path(CORE_API, namespace, PODS_PLURAL, name))

    def list_pods(self, namespace: str, *, job_uid: str, attempt: int) -> AsyncIterator[Raw]:
        """The pods of one attempt, wherever they come from."""
        selector = f"{JOB_UID_LABEL}={job_uid},{ATTEMPT_LABEL}={attempt}"
        return self._list(api_path(CORE_API, namespace, PODS_PLURAL), {"labelSelector": selector})

    # Jobs that verify adapters, and their pods

    async def get_batch_job(self, namespace: str, name: str) -> Raw | None:
        """The batch Job, or None."""
        return await self._get(api_path(BATCH_API, namespace, BATCH_PLURAL, name))

    async def create_batch_job(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create a batch Job."""
        return checked(await self.wire.request("POST", api_path(BATCH_API, namespace, BATCH_PLURAL), body=body))

    def list_batch_job_pods(self, namespace: str, *, uid: str) -> AsyncIterator[Raw]:
        """The pods of the batch Job with that uid."""
        return self._list(
            api_path(CORE_API, namespace, PODS_PLURAL), {"labelSelector": f"{CONTROLLER_UID_LABEL}={uid}"}
        )

    # What belongs to an attempt, and what belongs to the operator

    async def get_config_map(self, namespace: str, name: str) -> Raw | None:
        """The ConfigMap, or None."""
        return await self._get(api_path(CORE_API, namespace, "configmaps", name))

    async def create_config_map(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create a ConfigMap; its metadata."""
        path = api_path(CORE_API, namespace, "configmaps")
        return checked(await self.wire.request("POST", path, body=body, accept=METADATA))

    async def update_config_map(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Replace a ConfigMap that was read before."""
        path = api_path(CORE_API, namespace, "configmaps", body["metadata"]["name"])
        return await self.wire.request("PUT", path, body=body)

    async def delete_config_map(self, namespace: str, name: str, *, uid: str) -> None:
        """Delete the ConfigMap with that uid."""
        await self._delete(api_path(CORE_API, namespace, "configmaps", name), uid=uid)

    async def get_secret(self, namespace: str, name: str) -> Raw | None:
        """The Secret, or None."""
        return await self._get(api_path(CORE_API, namespace, "secrets", name))

    async def create_secret(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create a Secret."""
        return await self.wire.request("POST", api_path(CORE_API, namespace, "secrets"), body=body)

    async def update_secret(self, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Replace a Secret that was read before."""
        path = api_path(CORE_API, namespace, "secrets", body["metadata"]["name"])
        return await self.wire.request("PUT", path, body=body)

    async def review_token(self, token: str, audience: str) -> Raw:
        """The status of a TokenReview of `token` for `audience`."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self.wire.request("POST", "apis/authentication.k8s.io/v1/tokenreviews", body=body)
        status = answer.get("status")
        return status if isinstance(status, dict) else {}

    async def create_event(self, namespace: str, body: Mapping[str, Any]) -> None:
        """Post an event."""
        await self.wire.request("POST", api_path(CORE_API, namespace, "events"), body=body, accept=METADATA)

    # Lists

    async def list_metadata(self, kind: str, namespace: str | None) -> AsyncIterator[list[Raw]]:
        """Metadata alone of all FineTuneJobs, or of all PyTorchJobs or living pods of ours, page by page.

        Args:
            kind: FINETUNE_PLURAL, PYTORCH_PLURAL or PODS_PLURAL.
            namespace: where they are; None for everywhere.
        """
        api, query = _WATCHED[kind]
        async for page in self.wire.pages(api_path(api, namespace, kind), query, accept=METADATA_LIST):
            compared = [_compared(item) for item in page]
            page.clear()
            yield compared

    async def _list(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Raw]:
        async for page in self.wire.pages(path, query, accept="application/json"):
            page.reverse()
            while page:  # nothing holds what was handed over
                yield page.pop()

    async def _get(self, path: str) -> Raw | None:
        try:
            return checked(await self.wire.request("GET", path))
        except NotFound:
            return None

    async def _plurals(self, api: str) -> set[str]:
        """What is installed of a version of a group."""
        try:
            found = (await self.wire.request("GET", api)).get("resources")
        except NotFound:
            return set()
        return {str(item.get("name")) for item in (found if isinstance(found, list) else ()) if isinstance(item, dict)}

    async def _delete(self, path: str, *, uid: str, resource_version: str | None = None) -> None:
        preconditions = {"uid": uid} | ({"resourceVersion": resource_version} if resource_version else {})
        body = {"propagationPolicy": "Background", "preconditions": preconditions}
        try:
            await self.wire.request("DELETE", path, body=body)
        except NotFound:
            return


def _compared(item: Raw) -> Raw:
    """What a resync looks at. It keeps those that are not known, and labels and annotations may be 1.4 MB of each."""
    metadata = item["metadata"]
    kept = {key: metadata[key] for key in _COMPARED_METADATA if key in metadata}
    labels, owner = metadata.get("labels"), controller_of(item)
    if isinstance(labels, dict):
        kept["labels"] = {key: labels[key] for key in _COMPARED_LABELS if key in labels}
    if owner:
        kept["ownerReferences"] = [{key: owner[key] for key in _COMPARED_OWNER if key in owner}]
    return {"metadata": kept}


_COMPARED_METADATA = ("namespace", "name", "uid", "resourceVersion", "generation", "deletionTimestamp")
_COMPARED_OWNER = ("apiVersion", "kind", "name", "uid", "controller")
_COMPARED_LABELS = (JOB_NAME_LABEL, JOB_UID_LABEL, ATTEMPT_LABEL)
_WATCHED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    FINETUNE_PLURAL: (FINETUNE_API, {}),
    PYTORCH_PLURAL: (PYTORCH_API, {"labelSelector": JOB_UID_LABEL}),
    PODS_PLURAL: (CORE_API, {"labelSelector": JOB_UID_LABEL, "fieldSelector": LIVE_PODS}),
}
"""Kind -> where it is found, and what of it is ours."""
