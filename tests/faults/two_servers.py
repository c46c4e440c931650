"""The real API server and the simulated one, asked in the same way, and what their answers mean on either.

Each has its own uids and versions, and the real one fills in what nobody said: only what both can say is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_operator.cluster import LIVE_PODS
from finetune_operator.errors import ApiError
from finetune_operator.names import FINETUNE_PLURAL, JOB_UID_LABEL, PODS_PLURAL, PYTORCH_PLURAL
from tests.cluster.api import Api, Object
from tests.operator.simulation.clients import path_of
from tests.operator.simulation.rules import KINDS, is_garbage
from tests.operator.simulation.server import Event, SimulatedServer

CONFIG_MAPS = "configmaps"
WATCHED = {FINETUNE_PLURAL: ("", ""), PYTORCH_PLURAL: (JOB_UID_LABEL, ""), PODS_PLURAL: (JOB_UID_LABEL, LIVE_PODS)}
"""Kind that the operator watches -> label and field selector."""
Meaning = tuple[Any, ...]
Send = Callable[[str, str, Any, Mapping[str, str]], tuple[int, str, Object]]
"""Takes method (BIND puts a pod on a node), path, body and query; returns code, reason and object of the answer."""


@dataclass
class Side:
    """One of the two servers, and what a client has seen of it."""

    send: Send
    namespace: str
    prefix: str
    """Of the names of its objects, which tells examples apart."""
    seen: dict[str, list[Object]] = field(default_factory=dict)
    """Path -> what was answered about the object there, oldest first."""
    asked: int = 0
    """Requests so far."""

    def ask(self, method: str, plural: str, number: int, part: str = "", body: Any = None) -> Meaning:
        """What a request is answered with, as far as that is the same on either server."""
        self.asked += 1
        name = "" if method == "POST" else self.name(number)
        code, reason, answer = self.send(method, path_of(plural, name, part, namespace=self.namespace), body, {})
        if code >= 400:
            return code, reason
        if method == "DELETE":  # of an object that is gone the real one says little, and not always the same
            return ("done",)
        before = self.seen_of(plural, number)
        told = (*meaning(answer), not before or _version(answer) > _version(before[-1]))
        self.seen[self.path(plural, number)] = [*before, answer]
        return told

    def name(self, number: int) -> str:
        """Of the object of that number."""
        return f"{self.prefix}-{number}"

    def path(self, plural: str, number: int) -> str:
        """Of the object of that number."""
        return path_of(plural, self.name(number), namespace=self.namespace)

    def seen_of(self, plural: str, number: int) -> list[Object]:
        """What was answered about the object of that number, oldest first."""
        return self.seen.get(self.path(plural, number), [])

    def listed(self, plural: str, labels: str = "", fields: str = "") -> list[Object]:
        """Objects of a kind that selectors select, by name."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        _, _, answer = self.send("GET", path_of(plural, namespace=self.namespace), None, query)
        kind = {"apiVersion": KINDS[plural].api_version, "kind": KINDS[plural].kind}
        return [kind | item for item in answer["items"] if item["metadata"]["name"].startswith(f"{self.prefix}-")]

    def garbage(self) -> list[str]:
        """Names of objects whose owners are all gone."""
        found = [raw for plural in (*WATCHED, CONFIG_MAPS) for raw in self.listed(plural)]
        uids = {raw["metadata"]["uid"] for raw in found}
        return [raw["metadata"]["name"] for raw in found if is_garbage(raw, uids)]


def meaning(raw: Object) -> Meaning:
    """What an object says that both servers can say: nothing that one of them draws or fills in."""
    metadata, kind = raw["metadata"], next(kind for kind in KINDS.values() if kind.kind == raw["kind"])
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    return (
        metadata["name"],
        metadata.get("generation") if kind.custom else None,
        "deletionTimestamp" in metadata,
        metadata.get("deletionGracePeriodSeconds"),
        sorted(metadata.get("finalizers") or ()),
        (metadata.get("labels") or {}).get(JOB_UID_LABEL),
        len(metadata.get("ownerReferences") or ()),
        json.dumps([spec.get("backoffLimit"), (spec.get("runPolicy") or {}).get("suspend") is True, raw.get("data")]),
        [status.get(key) for key in ("phase", "startTime", "message")],
    )


class RealServer:
    """The API server of the control plane."""

    def __init__(self, api: Api) -> None:
        self._http = api.http

    def send(self, method: str, path: str, body: Any, query: Mapping[str, str]) -> tuple[int, str, Object]:
        """As `Send` says."""
        if method == "BIND":
            target = {"apiVersion": "v1", "kind": "Node", "name": body}
            metadata = {"name": path.rpartition("/")[2]}
            body = {"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": target}
            method, path = "POST", f"{path}/binding"
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        content = json.dumps(body) if body is not None else None
        answer = self._http.request(method, f"/{path}", content=content, params=query, headers={"Content-Type": kind})
        found: Object = answer.json()
        return answer.status_code, found.get("reason", "") if answer.is_error else "", found

    def version(self, path: str) -> str:
        """resourceVersion of a list, from which it can be watched."""
        _, _, answer = self.send("GET", path, None, {"limit": "1"})
        return str(answer["metadata"]["resourceVersion"])

    def events(self, path: str, query: Mapping[str, str], last: str) -> Iterator[Event]:
        """What a watch tells, up to the creation of an object of that name."""
        with self._http.stream("GET", f"/{path}", params={**query, "watch": "true"}) as answer:
            for line in answer.iter_lines():
                event = json.loads(line)
                if event["object"]["metadata"]["name"] == last:
                    return
                yield Event(event["type"], event["object"])


def simulated(server: SimulatedServer) -> Send:
    """The simulated API server."""

    def send(method: str, path: str, body: Any, query: Mapping[str, str]) -> tuple[int, str, Object]:
        if method == "BIND":
            method, body = "PATCH", {"spec": {"nodeName": body}}
        try:
            return 200, "", server.handle(method, path, body, query)
        except ApiError as error:
            return error.status or 0, error.reason, {}

    return send


def _version(raw: Object) -> int:
    return int(raw["metadata"]["resourceVersion"])
