"""What the operator asks of the API server, from the server's own audit log.

A test that counts writes, or looks for requests that were refused, counts what arrived, whatever the client believes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

LONGEST_LINE = 2**16
"""Bytes that a line has at most: it tells of an object, and does not show it."""
WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})


@dataclass(frozen=True)
class Request:
    """A request that the API server has answered; of a watch, that it has begun."""

    user: str
    verb: str
    resource: str
    """Plural, with the subresource behind a slash: finetunejobs/status."""
    namespace: str
    name: str
    code: int
    time: str
    """When it arrived, RFC 3339 in UTC."""
    forbidden: bool
    """Refused for want of permission. (A namespace that is being deleted refuses with 403 as well.)"""

    @property
    def writes(self) -> bool:
        """Whether it asks for a change."""
        return self.verb in WRITES


@dataclass(frozen=True)
class AuditLog:
    """The audit log of service accounts of one namespace."""

    file: Path
    namespace: str

    def server_flags(self, policy_file: Path) -> list[str]:
        """Flags of the API server, whose policy is written to a file here."""
        group = f"system:serviceaccounts:{self.namespace}"
        rules = [{"level": "Metadata", "userGroups": [group]}, {"level": "None"}]
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": rules}
        policy_file.write_text(yaml.safe_dump(policy))
        # Blocking is the default of a log file: an answer is in the log about when the client has it.
        return [f"--audit-policy-file={policy_file}", f"--audit-log-path={self.file}", "--audit-log-maxsize=10000"]

    def position(self) -> int:
        """Where what is asked from now on will begin (bytes): behind the last whole line."""
        if not self.file.exists():
            return 0
        with self.file.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE)
            file.seek(start)
            return start + file.read().rfind(b"\n") + 1

    def requests(self, user: str, since: int = 0) -> list[Request]:
        """Requests of a user behind a position, in the order of their answers."""
        if not self.file.exists():
            return []
        with self.file.open("rb") as file:
            file.seek(since)
            # The last line may be half written.
            lines = file.read().rpartition(b"\n")[0].splitlines()
        events = (json.loads(line) for line in lines)
        return [_request(event) for event in events if event["user"]["username"] == user and _counts(event)]


def _counts(event: dict[str, object]) -> bool:
    """A watch is logged when it begins and when it ends."""
    return event["verb"] != "watch" or event["stage"] == "ResponseStarted"


def _request(event: dict[str, object]) -> Request:
    reference = event.get("objectRef")
    target: dict[str, str] = reference if isinstance(reference, dict) else {}
    status, annotations, user = event.get("responseStatus"), event.get("annotations"), event["user"]
    parts = (target.get("resource", ""), target.get("subresource"))
    return Request(
        user=str(user["username"]) if isinstance(user, dict) else "",
        verb=str(event["verb"]),
        resource="/".join(part for part in parts if part),
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        code=int(status.get("code", 0)) if isinstance(status, dict) else 0,
        time=str(event["requestReceivedTimestamp"]),
        forbidden=isinstance(annotations, dict) and annotations.get("authorization.k8s.io/decision") == "forbid",
    )
