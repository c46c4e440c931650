"""What was created and deleted in a namespace, as the API server itself tells everybody who watches.

Neither the operator nor the proxy before it is asked: what both believe may be wrong.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import httpx

from finetune_operator.names import JOB_NAME_LABEL
from tests.cluster.api import KINDS, Api, Object

WATCHED = ("FineTuneJob", "ConfigMap", "PyTorchJob", "Job", "Pod")
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
WATCH_SECONDS = 1
"""After so long a watch begins anew where it was, so that it can be stopped."""


class Change(NamedTuple):
    """Something was created or deleted."""

    version: int
    """resourceVersion, which orders the changes of all kinds: they are those of one store."""
    what: str
    """created or deleted."""
    kind: str
    name: str
    job: str
    """Name of the FineTuneJob that it is, or belongs to."""


class History:
    """The history of one namespace; `watching` makes one."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._changes: list[Change] = []
        self._failures: list[str] = []
        self._stop = threading.Event()
        versions = {kind: self._list(kind) for kind in WATCHED}
        self._threads = [threading.Thread(target=self._watch, args=item, daemon=True) for item in versions.items()]

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, within a moment."""
        self._stop.set()

    def of(self, job: str) -> list[str]:
        """What was created and deleted for a job, in that order, and how many pods there were.

        Pods come and go as the training operator has it. What garbage collection deletes after the job is in no order.

        Raises:
            AssertionError: a part of the history was not seen.
        """
        assert not self._failures, self._failures
        changes = sorted(change for change in list(self._changes) if change.job == job)
        done = [change for change in changes if change.kind != "Pod"]
        end = next((place for place, c in enumerate(done) if (c.what, c.kind) == ("deleted", "FineTuneJob")), len(done))
        pods = Counter(change.name for change in changes if (change.what, change.kind) == ("created", "Pod"))
        return [
            *_lines(done[:end]),
            *sorted(_lines(done[end:])),
            *(f"{count} times pod {name}" for name, count in sorted(pods.items())),
        ]

    def created(self, job: str, kind: str) -> list[str]:
        """Names of what was created for a job, in that order."""
        changes = sorted(change for change in list(self._changes) if change.job == job)
        return [change.name for change in changes if (change.what, change.kind) == ("created", kind)]

    def left(self, job: str) -> list[str]:
        """Kind and name of what was created for a job and not deleted; "nothing seen" where nothing ever was."""
        changes = [change for change in list(self._changes) if change.job == job]
        made, gone = (Counter((c.kind, c.name) for c in changes if c.what == what) for what in ("created", "deleted"))
        return sorted(f"{kind} {name}" for kind, name in made - gone) if made else ["nothing seen"]

    def _list(self, kind: str) -> str:
        found = self._api.request("GET", self._path(kind), headers={"Accept": METADATA_LIST})
        return str(found["metadata"]["resourceVersion"])

    def _path(self, kind: str) -> str:
        version, plural, _ = KINDS[kind]
        root = "/api" if "/" not in version else "/apis"
        return f"{root}/{version}/namespaces/{self._api.namespace}/{plural}"

    def _watch(self, kind: str, version: str) -> None:
        while not self._stop.is_set():
            query = {"watch": "1", "allowWatchBookmarks": "1", "timeoutSeconds": str(WATCH_SECONDS)}
            query["resourceVersion"] = version
            try:
                with self._api.http.stream(
                    "GET", self._path(kind), params=query, headers={"Accept": METADATA}
                ) as answer:
                    for line in answer.iter_lines():
                        version = self._note(kind, json.loads(line)) or version
            except httpx.TransportError:
                continue  # an API server that a test has stopped comes back
            except RuntimeError:
                return  # the tests are over, and their client is closed
            except LookupError as error:
                self._failures.append(f"The watch of {kind} broke off: {error}")
                return

    def _note(self, kind: str, event: Object) -> str | None:
        if event["type"] == "ERROR":
            raise LookupError(event["object"])
        metadata = event["object"]["metadata"]
        what = {"ADDED": "created", "DELETED": "deleted"}.get(event["type"])
        labels = metadata.get("labels") or {}
        job = metadata.get("name") if kind == "FineTuneJob" else labels.get(JOB_NAME_LABEL)
        if what and job:
            self._changes.append(Change(int(metadata["resourceVersion"]), what, kind, metadata["name"], job))
        return str(metadata["resourceVersion"])


@contextmanager
def watching(api: Api) -> Iterator[History]:
    """The history of a namespace from now on."""
    history = History(api)
    history.start()
    try:
        yield history
    finally:
        history.stop()


def _lines(changes: Sequence[Change]) -> list[str]:
    return [f"{change.what} {change.kind} {change.name}" for change in changes]
