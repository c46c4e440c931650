"""Whoever else writes to the API server: plain requests, with the names filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.errors import NotFound
from finetune_operator.wire import Raw, api_path
from tests.operator.simulation.rules import KINDS
from tests.operator.simulation.server import SimulatedServer

NAMESPACE = "team"


class Client:
    """Requests about objects in the one namespace that there is."""

    def __init__(self, server: SimulatedServer) -> None:
        self.server = server

    def find(self, plural: str, **selectors: str) -> list[Raw]:
        """Those that selectors (`labels`, `fields`) select, by name."""
        return self.server.find(plural, **selectors)

    def get(self, plural: str, name: str) -> Raw | None:
        """The object, or None."""
        try:
            return self.server.handle("GET", path_of(plural, name))
        except NotFound:
            return None

    def create(self, plural: str, body: Mapping[str, Any]) -> Raw:
        """The object that is made of `body`."""
        return self.server.handle("POST", path_of(plural), body)

    def patch(self, raw: Raw, patch: Mapping[str, Any], part: str = "") -> Raw:
        """The object after a JSON merge patch."""
        return self.server.handle("PATCH", path_of(plural_of(raw), raw["metadata"]["name"], part), patch)

    def set_status(self, raw: Raw, status: Mapping[str, Any]) -> Raw:
        """The object with another status, whatever happened to it meanwhile."""
        found = self.server.handle("GET", path_of(plural_of(raw), raw["metadata"]["name"]))
        body = {**found, "status": status}
        return self.server.handle("PUT", path_of(plural_of(raw), raw["metadata"]["name"], "status"), body)

    def delete(self, raw: Raw, **options: Any) -> None:
        """Ask for its deletion, by its uid."""
        body = {**options, "preconditions": {"uid": raw["metadata"]["uid"]}}
        self.server.handle("DELETE", path_of(plural_of(raw), raw["metadata"]["name"]), body)


def path_of(plural: str, name: str = "", part: str = "", *, namespace: str = NAMESPACE) -> str:
    """Path of a collection, an object, or a part of one."""
    version = KINDS[plural].api_version
    api = f"apis/{version}" if "/" in version else f"api/{version}"
    return api_path(api, namespace, *(word for word in (plural, name, part) if word))


def plural_of(raw: Raw) -> str:
    """Plural of its kind."""
    return next(plural for plural, kind in KINDS.items() if kind.kind == raw["kind"])


def owner_uid(raw: Raw) -> str:
    """uid of its owner; empty where it has none."""
    return next((str(owner["uid"]) for owner in raw["metadata"].get("ownerReferences") or ()), "")


def is_going(raw: Raw) -> bool:
    """Whether its deletion was asked for."""
    return "deletionTimestamp" in raw["metadata"]
