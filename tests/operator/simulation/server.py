"""An API server in memory, with what of Kubernetes' semantics a reconciler can stumble over.

It answers requests as they stand on the wire, and tests/faults/test_conformance.py compares the answers with those of
a real one. It leaves out schemas and admission, versions of lists, and who may do what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from finetune_operator.errors import api_error
from finetune_operator.wire import Raw
from tests.operator.simulation.rules import (
    KINDS,
    copied,
    created,
    deleted,
    is_free_to_go,
    is_garbage,
    merged,
    updated,
)
from tests.operator.simulation.selectors import selects

EPOCH = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


class Place(NamedTuple):
    """What a path names; a collection where `name` is empty."""

    plural: str
    namespace: str
    name: str
    part: str = ""
    """`status`, or empty for the whole object."""


class Event(NamedTuple):
    """What a watch tells: ADDED, MODIFIED or DELETED, and the object. Of one that is gone, its last state."""

    type: str
    raw: Raw


class Change(NamedTuple):
    """An object before and after; None where it was or is not there."""

    place: Place
    before: Raw | None
    after: Raw | None


class SimulatedServer:
    """Holds objects.

    Args:
        now: its clock, UTC.
        uid: the uid of the n-th object that is created.
        admit: changes an object that is to be created, as a mutating webhook does.
    """

    def __init__(
        self,
        now: Callable[[], datetime] = lambda: EPOCH,
        *,
        uid: Callable[[int], str] = lambda number: f"{number:08x}-0000-4000-8000-000000000000",
        admit: Callable[[Place, Raw], None] = lambda place, raw: None,
    ) -> None:
        self._now, self._uid, self._admit = now, uid, admit
        self._objects: dict[tuple[str, str, str], Raw] = {}
        self.version, self._created = 0, 0
        """resourceVersion of the last change."""
        self.listeners: list[Callable[[Change], None]] = []
        """Told of every change, in their order."""

    def handle(self, method: str, path: str, body: Any = None, query: Mapping[str, str] | None = None) -> Raw:
        """The answer to a request.

        Raises:
            ApiError: it is refused.
        """
        place = place_of(path)
        if method == "GET" and not place.name:
            labels, fields = ((query or {}).get(key, "") for key in ("labelSelector", "fieldSelector"))
            return {"metadata": {}, "items": self.find(place.plural, place.namespace, labels=labels, fields=fields)}
        if method == "POST":
            return copied(self._create(place, copied(body)))
        before = self._objects.get(place[:3])
        wished = copied(body or {})
        if before is None:
            raise api_error(404, "NotFound", f'{place.plural} "{place.name}" not found')
        if method == "PUT" and wished["metadata"].get("uid") not in (None, before["metadata"]["uid"]):
            raise api_error(409, "Conflict", f"Precondition failed: UID in precondition: {wished['metadata']['uid']}")
        if method == "PATCH":
            wished = merged(copied(before), wished)
        if method in ("PUT", "PATCH"):
            return copied(self._replace(place, before, updated(KINDS[place.plural], before, wished, place.part)))
        if method == "DELETE":
            return copied(self._delete(place, before, wished))
        return copied(before)

    def find(self, plural: str, namespace: str = "", *, labels: str = "", fields: str = "") -> list[Raw]:
        """Objects of a kind in a namespace, or in all; by name."""
        selected = selects(labels, fields)
        found = (raw for key, raw in sorted(self._objects.items()) if key[0] == plural and namespace in ("", key[1]))
        return [copied(raw) for raw in found if selected(raw)]

    def watch(
        self, plural: str, tell: Callable[[Event], None], labels: str = "", fields: str = ""
    ) -> Callable[[], None]:
        """Tell of every change from now on to what is selected, until the function is called that is returned."""
        selected = selects(labels, fields)

        def hear(change: Change) -> None:
            event = seen_by(selected, change) if change.place.plural == plural else None
            if event is not None:
                tell(event)

        self.listeners.append(hear)
        return lambda: self.listeners.remove(hear)

    def collect(self) -> bool:
        """One step of garbage collection: objects whose owners are all gone are deleted; whether there were any."""
        uids = {raw["metadata"]["uid"] for raw in self._objects.values()}
        doomed = [(Place(*key), raw) for key, raw in self._objects.items() if is_garbage(raw, uids)]
        for place, raw in doomed:
            self._delete(place, raw, {})
        return bool(doomed)

    def _create(self, place: Place, raw: Raw) -> Raw:
        self._created += 1
        metadata = raw["metadata"]
        metadata.setdefault("name", f"{metadata.get('generateName')}{self._created:05x}")
        place = place._replace(name=metadata["name"])
        if place[:3] in self._objects:
            raise api_error(409, "AlreadyExists", f'{place.plural} "{place.name}" already exists')
        self._admit(place, raw)
        made = created(KINDS[place.plural], raw, place.namespace, self._uid(self._created), self._now())
        return self._store(place, None, made)

    def _delete(self, place: Place, before: Raw, options: Mapping[str, Any]) -> Raw:
        after = deleted(KINDS[place.plural], before, options, self._now())
        if after is not None and after != before:
            before = after = self._store(place, before, after)
        return self._replace(place, before, after)

    def _replace(self, place: Place, before: Raw, after: Raw | None) -> Raw:
        if after is None or is_free_to_go(after):
            self.version += 1
            del self._objects[place[:3]]
            last = {**before, "metadata": {**before["metadata"], "resourceVersion": str(self.version)}}
            self._tell(Change(place, last, None))
            return after or last
        return before if after == before else self._store(place, before, after)

    def _store(self, place: Place, before: Raw | None, after: Raw) -> Raw:
        self.version += 1
        after = {**after, "metadata": {**after["metadata"], "resourceVersion": str(self.version)}}
        self._objects[place[:3]] = after
        self._tell(Change(place, before, after))
        return after

    def _tell(self, change: Change) -> None:
        for listener in list(self.listeners):
            listener(change)


def place_of(path: str) -> Place:
    """What a path names, such as apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs/guard/status."""
    parts = path.strip("/").split("/")
    rest, namespace = parts[2:] if parts[0] == "api" else parts[3:], ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    plural, name, part = (*rest, "", "")[:3]
    return Place(plural, namespace, name, part)


def seen_by(selected: Callable[[Raw], bool], change: Change) -> Event | None:
    """What a watch tells of a change. What leaves the selection is told as deleted, in its old state."""
    before, after = change.before, change.after
    was = before is not None and selected(before)
    if after is not None and selected(after):
        return Event("MODIFIED" if was else "ADDED", copied(after))
    if not was or before is None:
        return None
    last: Raw = copied(before)
    last["metadata"]["resourceVersion"] = (after or before)["metadata"]["resourceVersion"]
    return Event("DELETED", last)
