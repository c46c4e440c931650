"""The API server as tests see it: plain dictionaries in, plain dictionaries out, and one way of waiting.

Not the operator's own client: a mistake in that one must not hide itself.
"""

from __future__ import annotations

import dataclasses
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import yaml

Object = dict[str, Any]
T = TypeVar("T")

POLL_SECONDS = 0.05
WAIT_SECONDS = 30


class _Kind(NamedTuple):
    api_version: str
    plural: str
    namespaced: bool = True


KINDS = {
    "Binding": _Kind("v1", "bindings"),
    "ConfigMap": _Kind("v1", "configmaps"),
    "Event": _Kind("v1", "events"),
    "LimitRange": _Kind("v1", "limitranges"),
    "Namespace": _Kind("v1", "namespaces", namespaced=False),
    "Node": _Kind("v1", "nodes", namespaced=False),
    "PersistentVolumeClaim": _Kind("v1", "persistentvolumeclaims"),
    "Pod": _Kind("v1", "pods"),
    "ResourceQuota": _Kind("v1", "resourcequotas"),
    "Secret": _Kind("v1", "secrets"),
    "Service": _Kind("v1", "services"),
    "ServiceAccount": _Kind("v1", "serviceaccounts"),
    "Deployment": _Kind("apps/v1", "deployments"),
    "NetworkPolicy": _Kind("networking.k8s.io/v1", "networkpolicies"),
    "PodDisruptionBudget": _Kind("policy/v1", "poddisruptionbudgets"),
    "PriorityClass": _Kind("scheduling.k8s.io/v1", "priorityclasses", namespaced=False),
    "Job": _Kind("batch/v1", "jobs"),
    "Lease": _Kind("coordination.k8s.io/v1", "leases"),
    "Role": _Kind("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": _Kind("rbac.authorization.k8s.io/v1", "rolebindings"),
    "ClusterRole": _Kind("rbac.authorization.k8s.io/v1", "clusterroles", namespaced=False),
    "ClusterRoleBinding": _Kind("rbac.authorization.k8s.io/v1", "clusterrolebindings", namespaced=False),
    "TokenReview": _Kind("authentication.k8s.io/v1", "tokenreviews", namespaced=False),
    "CustomResourceDefinition": _Kind("apiextensions.k8s.io/v1", "customresourcedefinitions", namespaced=False),
    "ValidatingWebhookConfiguration": _Kind(
        "admissionregistration.k8s.io/v1", "validatingwebhookconfigurations", namespaced=False
    ),
    "FineTuneJob": _Kind("finetune.dev/v1alpha1", "finetunejobs"),
    "PyTorchJob": _Kind("kubeflow.org/v1", "pytorchjobs"),
}
"""What tests handle. Anything else goes through kubectl."""


class ApiError(Exception):
    """The API server refused; `code` is the HTTP status, `reason` its machine-readable word, the text its message."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Api:
    """A client with one identity; methods take the namespace from `namespace` unless told otherwise."""

    http: httpx.Client
    namespace: str | None = None

    @classmethod
    def connect(cls, url: str, token: str, ca_file: Path, namespace: str | None = None) -> Api:
        """A client that proves itself with a bearer token."""
        headers = {"Authorization": f"Bearer {token}"}
        context = ssl.create_default_context(cafile=str(ca_file))
        return cls(httpx.Client(base_url=url, headers=headers, verify=context, timeout=60, trust_env=False), namespace)

    def in_namespace(self, namespace: str) -> Api:
        """The same client for another namespace."""
        return dataclasses.replace(self, namespace=namespace)

    def get(self, kind: str, name: str, namespace: str | None = None) -> Object:
        """The object as it is now.

        Raises:
            ApiError: code 404, there is none.
        """
        return self.request("GET", self._path(kind, name, namespace))

    def find(self, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """The object, or None when there is none."""
        try:
            return self.get(kind, name, namespace)
        except ApiError as error:
            if error.code == httpx.codes.NOT_FOUND:
                return None
            raise

    def list(
        self, kind: str, namespace: str | None = None, *, labels: str = "", fields: str = "", everywhere: bool = False
    ) -> list[Object]:
        """Objects of a kind, by label and field selectors, in one namespace or everywhere."""
        selectors = {"labelSelector": labels, "fieldSelector": fields}
        path = self._path(kind, None, namespace, everywhere=everywhere)
        answer = self.request("GET", path, params={key: value for key, value in selectors.items() if value})
        items: list[Object] = answer["items"]
        # The items of a list do not say what they are.
        return [{"apiVersion": KINDS[kind].api_version, "kind": kind, **item} for item in items]

    def create(self, body: Object, namespace: str | None = None) -> Object:
        """Create, and return what the server has made of it.

        Raises:
            ApiError: code 409, it exists; 422 or 400, it is invalid; and others.
        """
        namespace = namespace or body.get("metadata", {}).get("namespace")
        return self.request("POST", self._path(body["kind"], None, namespace), json=body)

    def apply(self, body: Object, namespace: str | None = None, *, manager: str = "tests") -> Object:
        """Server-side apply, with strict checks of unknown fields and with force, as `kubectl apply` does."""
        namespace = namespace or body.get("metadata", {}).get("namespace")
        return self.request(
            "PATCH",
            self._path(body["kind"], body["metadata"]["name"], namespace),
            json=body,
            params={"fieldManager": manager, "force": "true", "fieldValidation": "Strict"},
            headers={"Content-Type": "application/apply-patch+yaml"},
        )

    def patch(self, kind: str, name: str, body: Mapping[str, Any], namespace: str | None = None) -> Object:
        """JSON merge patch: lists are replaced whole, null removes."""
        return self._merge(self._path(kind, name, namespace), body)

    def patch_status(self, kind: str, name: str, status: Mapping[str, Any], namespace: str | None = None) -> Object:
        """JSON merge patch of what is below `status`."""
        return self._merge(f"{self._path(kind, name, namespace)}/status", {"status": status})

    def delete(
        self,
        kind: str,
        name: str,
        namespace: str | None = None,
        *,
        grace_seconds: int | None = None,
        propagation: str | None = None,
        uid: str | None = None,
    ) -> None:
        """Ask for deletion; that it is gone already is no error.

        Raises:
            ApiError: code 409, an object of that name has another `uid` than the given one.
        """
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        if uid:
            options["preconditions"] = {"uid": uid}
        if propagation:
            options["propagationPolicy"] = propagation
        try:
            self.request("DELETE", self._path(kind, name, namespace), json=options)
        except ApiError as error:
            if error.code != httpx.codes.NOT_FOUND:
                raise

    def wait(
        self,
        kind: str,
        name: str,
        condition: Callable[[Object], object],
        timeout_seconds: float = WAIT_SECONDS,
        namespace: str | None = None,
    ) -> Object:
        """The object as soon as it exists and satisfies a condition; see `wait_until`."""
        found = wait_until(
            lambda: self.find(kind, name, namespace), lambda seen: seen and condition(seen), timeout_seconds
        )
        return found or {}

    def wait_gone(
        self, kind: str, name: str, timeout_seconds: float = WAIT_SECONDS, namespace: str | None = None
    ) -> None:
        """Return once there is no such object."""
        wait_until(lambda: self.find(kind, name, namespace), lambda found: found is None, timeout_seconds)

    def request(self, method: str, path: str, **options: Any) -> Object:
        """Any request, for what has no method here.

        Raises:
            ApiError: the answer is no success.
        """
        response = self.http.request(method, path, **options)
        if response.is_error:
            raise _error(response)
        answer: Object = response.json()
        return answer

    def _merge(self, path: str, body: Mapping[str, Any]) -> Object:
        return self.request("PATCH", path, json=body, headers={"Content-Type": "application/merge-patch+json"})

    def _path(self, kind: str, name: str | None, namespace: str | None, *, everywhere: bool = False) -> str:
        version, plural, namespaced = KINDS[kind]
        parts = ["/api" if "/" not in version else "/apis", version]
        if namespaced and not everywhere:
            namespace = namespace or self.namespace
            if namespace is None:
                raise ValueError(f"{kind} {name or ''}: name a namespace.")
            parts += ["namespaces", namespace]
        return "/".join([*parts, plural, *([name] if name else [])])


def _error(response: httpx.Response) -> ApiError:
    try:
        status = response.json()
        return ApiError(response.status_code, status["reason"], status["message"])
    except (ValueError, KeyError, TypeError):
        return ApiError(response.status_code, response.reason_phrase, response.text)


def wait_until(
    look: Callable[[], T], condition: Callable[[T], object] = bool, timeout_seconds: float = WAIT_SECONDS
) -> T:
    """What `look` returns, as soon as it satisfies `condition`. That the server cannot be reached means: not yet.

    Raises:
        AssertionError: it never did; the text holds what was seen last.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        seen: object
        try:
            found = look()
            if condition(found):
                return found
            seen = found
        except httpx.TransportError as error:
            seen = repr(error)
        if time.monotonic() > deadline:
            raise AssertionError(f"Not so within {timeout_seconds:.0f} s. Seen last:\n{_shown(seen)}")
        time.sleep(POLL_SECONDS)


def condition_of(found: Object, condition_type: str) -> Object | None:
    """The condition of a type in an object's status."""
    conditions: list[Object] = found.get("status", {}).get("conditions") or []
    return next((condition for condition in conditions if condition["type"] == condition_type), None)


def has_condition(found: Object, condition_type: str, status: str = "True") -> bool:
    """Whether an object's status has a condition of that type and status."""
    condition = condition_of(found, condition_type)
    return condition is not None and condition["status"] == status


def _shown(seen: object) -> str:
    if isinstance(seen, dict):
        metadata = {key: value for key, value in seen.get("metadata", {}).items() if key != "managedFields"}
        seen = {**seen, "metadata": metadata}
    try:
        return yaml.safe_dump(seen, sort_keys=False, width=120)
    except yaml.YAMLError:
        return repr(seen)
