"""As much of an API server as the progress package needs, in memory: tests/cluster/ runs it against a real one."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from finetune_operator.errors import ApiError, api_error
from finetune_operator.names import (
    ATTEMPT_LABEL,
    JOB_NAME_LABEL,
    JOB_UID_LABEL,
    REPLICA_INDEX_LABEL,
    child_name,
    pod_name,
)

Object = dict[str, Any]

JOB_UID = "0b5c1f6e-8d0f-4c55-a0f0-51a1b3f0c0de"
PYTORCHJOB_UID = "uid-of-the-pytorchjob"


def worker(
    index: int = 0, *, namespace: str = "team-a", attempt: int = 1, job: str = "guard", uid: str = JOB_UID
) -> Object:
    """A worker's pod of a job, as the training operator makes it."""
    owner = child_name(job, uid, attempt)
    return {
        "metadata": {
            "namespace": namespace,
            "name": pod_name(owner, index),
            "uid": f"uid-of-worker-{index}",
            "creationTimestamp": "2030-01-02T03:04:05Z",
            "labels": {
                JOB_NAME_LABEL: job,
                JOB_UID_LABEL: uid,
                ATTEMPT_LABEL: str(attempt),
                REPLICA_INDEX_LABEL: str(index),
            },
            "ownerReferences": [
                {
                    "apiVersion": "kubeflow.org/v1",
                    "kind": "PyTorchJob",
                    "name": owner,
                    "uid": PYTORCHJOB_UID,
                    "controller": True,
                }
            ],
        }
    }


def token_of(pod: Object | None, *, number: Any = 1, namespace: Any = "team-a", **changed: Any) -> str:
    """What a kubelet projects into `pod`, as far as a reader without the key can tell; None: of no pod.

    Args:
        pod: the pod that it is bound to.
        number: tells tokens of one pod apart.
        namespace: of a token of no pod.
        changed: claims that are otherwise than usual; None takes one away.
    """
    metadata = pod["metadata"] if pod else {"namespace": namespace}
    bound = {"pod": {"name": metadata["name"], "uid": metadata["uid"]}} if pod else {}
    claims: Object = {
        "aud": ["finetune-operator"],
        "exp": 4_000_000_000,
        "iss": "https://kubernetes.default.svc.cluster.local",
        "jti": str(number),
        "kubernetes.io": {"namespace": metadata["namespace"], **bound, "serviceaccount": {"name": "default"}},
        "sub": f"system:serviceaccount:{metadata['namespace']}:default",
        **changed,
    }
    return jwt({name: value for name, value in claims.items() if value is not None})


def jwt(claims: Any) -> str:
    """A JSON Web Token that says this, with a signature that nobody looks at."""
    parts = (json.dumps({"alg": "RS256"}), json.dumps(claims), "signature")
    return ".".join(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts)


def review_of(pod: Object, audience: str = "finetune-operator") -> Object:
    """Status of the TokenReview of a good token that is bound to `pod`."""
    metadata = pod["metadata"]
    return {
        "authenticated": True,
        "audiences": [audience],
        "user": {
            "username": f"system:serviceaccount:{metadata['namespace']}:default",
            "extra": {
                "authentication.kubernetes.io/pod-name": [metadata["name"]],
                "authentication.kubernetes.io/pod-uid": [metadata["uid"]],
            },
        },
    }


class FakeCluster:
    """Secrets, ConfigMaps and pods by (namespace, name), and the review of each known token."""

    def __init__(self) -> None:
        self.secrets: dict[tuple[str, str], Object] = {}
        self.config_maps: dict[tuple[str, str], Object] = {}
        self.pods: dict[tuple[str, str], Object] = {}
        self.reviews: dict[str, Object] = {}
        self.requests: list[str] = []
        """Names of the methods that were called."""
        self.reviewed: list[str] = []
        """Tokens that were asked about."""
        self.error: ApiError | None = None
        """What every request fails with."""
        self.refused: dict[str, ApiError] = {}
        """What requests of one method fail with."""
        self.before_write: Callable[[], None] = lambda: None
        """What somebody else does just before the next write."""
        self.answers = asyncio.Event()
        """Cleared while token reviews have to wait."""
        self.answers.set()
        self._version = 0

    def add_pod(self, pod: Object) -> str:
        """Add `pod`; a token that is bound to it."""
        self.pods[pod["metadata"]["namespace"], pod["metadata"]["name"]] = pod
        token = token_of(pod)
        self.reviews[token] = review_of(pod)
        return token

    def stored(self, kept: Object) -> Object:
        """`kept` with a new resourceVersion."""
        self._version += 1
        return {**deepcopy(kept), "metadata": {**kept["metadata"], "resourceVersion": str(self._version)}}

    async def review_token(self, token: str, audience: str) -> Object:
        await self._request("review_token")
        self.reviewed.append(token)
        await self.answers.wait()
        return self.reviews.get(token, {"authenticated": False, "error": "invalid bearer token", "user": {}})

    async def get_pod(self, namespace: str, name: str) -> Object | None:
        await self._request("get_pod")
        return self.pods.get((namespace, name))

    async def get_secret(self, namespace: str, name: str) -> Object | None:
        await self._request("get_secret")
        return deepcopy(self.secrets.get((namespace, name)))

    async def create_secret(self, namespace: str, body: Object) -> Object:
        await self._request("create_secret")
        return self._create(self.secrets, namespace, body)

    async def update_secret(self, namespace: str, body: Object) -> Object:
        await self._request("update_secret")
        return self._update(self.secrets, namespace, body)

    async def get_config_map(self, namespace: str, name: str) -> Object | None:
        await self._request("get_config_map")
        return deepcopy(self.config_maps.get((namespace, name)))

    async def create_config_map(self, namespace: str, body: Object) -> Object:
        await self._request("create_config_map")
        return self._create(self.config_maps, namespace, body)

    async def update_config_map(self, namespace: str, body: Object) -> Object:
        await self._request("update_config_map")
        return self._update(self.config_maps, namespace, body)

    async def _request(self, method: str) -> None:
        self.requests.append(method)
        await asyncio.sleep(0)
        error = self.error or self.refused.get(method)
        if error is not None:
            raise error

    def _somebody_else(self) -> None:
        act, self.before_write = self.before_write, lambda: None
        act()

    def _create(self, kept: dict[tuple[str, str], Object], namespace: str, body: Object) -> Object:
        self._somebody_else()
        key = namespace, body["metadata"]["name"]
        if key in kept:
            raise api_error(409, "AlreadyExists", "It exists.")
        kept[key] = self.stored(body)
        return kept[key]

    def _update(self, kept: dict[tuple[str, str], Object], namespace: str, body: Object) -> Object:
        self._somebody_else()
        key = namespace, body["metadata"]["name"]
        if key not in kept:
            raise api_error(404, "NotFound", "It is gone.")
        if kept[key]["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise api_error(409, "Conflict", "It was changed.")
        kept[key] = self.stored(body)
        return kept[key]
