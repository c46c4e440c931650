"""What the operator asks of the API server, read off the wire: which verb, which object, and which job it is about."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from aiohttp import web

from finetune_operator.names import JOB_NAME_LABEL
from tests.cluster.api import Object

VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get"}
_PATH = re.compile(
    r"/apis?/(?:[^/]+/)?v\w+/(?:namespaces/(?P<ns>[^/]+)/)?(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?P<sub>.*)"
)
_CHILD = re.compile(r"(?P<job>.+)-[0-9a-f]{8}-(?:\d+(?:-worker-\d+)?|verify)")


@dataclass(frozen=True)
class Call:
    """A request of the operator's."""

    verb: str
    """create, update, delete, get, list or watch."""
    resource: str
    """Plural, with a subresource behind a slash: finetunejobs/status."""
    namespace: str
    name: str
    """Name of the object, from the path or the body; "" for lists, and for events, whose names the server makes."""
    job: str
    """Name of the FineTuneJob that it is about; "" where that cannot be told."""
    body: Object = field(repr=False, hash=False, compare=False)

    @property
    def writes(self) -> bool:
        """Whether it asks for a change of a job or of what belongs to one."""
        return self.verb in ("create", "update", "patch", "delete") and self.resource != "tokenreviews"


def job_of(resource: str, found: Object) -> str:
    """Name of the FineTuneJob that an object is, or belongs to; "" where that cannot be told."""
    metadata = found.get("metadata") or {}
    if resource.startswith("finetunejobs"):
        return str(metadata.get("name", ""))
    if resource == "events":
        return str((found.get("involvedObject") or {}).get("name", ""))
    return str((metadata.get("labels") or {}).get(JOB_NAME_LABEL, ""))


def read_call(request: web.Request, content: bytes) -> Call:
    """What a request with this body asks for."""
    path = _PATH.fullmatch(request.path)
    parts = path.groupdict() if path else {"ns": "", "plural": request.path, "name": "", "sub": ""}
    resource, name = f"{parts['plural']}{parts['sub'] or ''}", parts["name"] or ""
    body: Object = json.loads(content) if content else {}
    job = job_of(resource, body) or (name if resource.startswith("finetunejobs") else "")
    child = _CHILD.fullmatch(name)
    verb = VERBS.get(request.method, request.method)
    if verb == "get" and not name:
        verb = "watch" if request.query.get("watch") == "true" else "list"
    return Call(
        verb=verb,
        resource=resource,
        namespace=parts["ns"] or "",
        name=name or str((body.get("metadata") or {}).get("name", "")),
        job=job or (child["job"] if child else ""),
        body=body,
    )
