"""What can go wrong between an operator and its API server, as values that a test hands to the fault proxy."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.cluster.api import Object
from tests.faults.calls import Call

SWALLOW = float("inf")
"""Seconds to delay a watch event by: it never comes."""
DEEP = 3000
"""Levels, more than any parser of JSON follows."""


class Fate(enum.Enum):
    """What becomes of a request or of its answer."""

    DROP = "the connection breaks without an answer"
    HOLD = "the connection stays open and nothing comes"
    STALL = "half of the answer comes, then nothing, and the connection stays open"


@dataclass(frozen=True)
class Refusal:
    """An answer that the API server never gave."""

    code: int
    message: str = "Made to fail by a test."
    retry_after: int | str | None = None
    """Of the header Retry-After: seconds, or whatever a server may write there."""
    body: bytes | None = None
    """In place of a Status."""

    def content(self) -> bytes:
        """The body."""
        if self.body is not None:
            return self.body
        return json.dumps(status(self.code, self.message)).encode()


@dataclass(frozen=True)
class Garbled:
    """The server's own answer, or a line of its watch, made into something else on the way."""

    change: Callable[[bytes], bytes]


Refuse = Callable[[Call], Refusal | Fate | None]
"""Answers in the server's place; None passes the request on. DROP and HOLD keep it from the server."""
AfterAnswer = Callable[[Call, int], Fate | Garbled | None]
"""Told of an answer's code before the operator gets it; None passes it on."""
OnEvent = Callable[[str, Object], float | Garbled | None]
"""Told of the plural and the watch event; seconds to delay it, SWALLOW to keep it, None or 0 to pass it on."""


def status(code: int, message: str = "Made to fail.") -> Object:
    """What an API server answers with when it refuses."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "message": message}


def nested(levels: int = DEEP) -> str:
    """JSON that goes that deep."""
    return '{"a":' * levels + "1" + "}" * levels


def _shaped(change: Callable[[Any], Any]) -> Garbled:
    """An answer of another shape; what is no JSON stays as it is."""
    return Garbled(lambda content: json.dumps(change(json.loads(content))).encode())


def _html(_: bytes) -> bytes:
    return b"<html><body><h1>502 Bad Gateway</h1></body></html>\n"


ANSWERS: Mapping[str, Garbled] = {
    "truncated": Garbled(lambda content: content[: len(content) // 2]),
    "html": Garbled(_html),
    "empty": Garbled(lambda _: b""),
    "null": _shaped(lambda _: None),
    "a list": _shaped(lambda found: [found]),
    "a text": _shaped(lambda _: "ok"),
    "an empty object": _shaped(lambda _: {}),
    "a status": _shaped(lambda _: {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}),
    "metadata null": _shaped(lambda found: {**found, "metadata": None}),
    "metadata a list": _shaped(lambda found: {**found, "metadata": [1]}),
    "metadata empty": _shaped(lambda found: {**found, "metadata": {}}),
    "too deep": Garbled(lambda _: nested().encode()),
    "not text": Garbled(lambda content: b"\xff\xfe" + content),
}
"""What may come in place of an object or a list with a 200."""
LISTS: Mapping[str, Garbled] = {
    **ANSWERS,
    "items a text": _shaped(lambda found: {**found, "items": "none"}),
    "items a number": _shaped(lambda found: {**found, "items": 7}),
    "items an object": _shaped(lambda found: {**found, "items": {"a": 1}}),
    "items null": _shaped(lambda found: {**found, "items": None}),
    "no items": _shaped(lambda found: {key: value for key, value in found.items() if key != "items"}),
    "null items": _shaped(lambda found: {**found, "items": [None, *(found["items"] or []), None]}),
    "items of another kind": _shaped(lambda found: {**found, "items": [1, "a", [], {}, *(found["items"] or [])]}),
    "items without a name": _shaped(lambda found: {**found, "items": [{"metadata": {}}, *(found["items"] or [])]}),
    "continue a number": _shaped(lambda found: {**found, "metadata": {**found["metadata"], "continue": 7}}),
}
"""What may come in place of a list."""


def said(event: Any) -> bytes:
    """A line of a watch."""
    return json.dumps(event).encode() + b"\n"


WATCH_ENDS: Mapping[str, bytes] = {
    "410": said({"type": "ERROR", "object": status(410)}),
    "500": said({"type": "ERROR", "object": status(500)}),
    "403": said({"type": "ERROR", "object": status(403)}),
    "an error without a code": said({"type": "ERROR", "object": {"kind": "Status", "message": "no"}}),
    "an error that is a text": said({"type": "ERROR", "object": "gone"}),
    "an error of null": said({"type": "ERROR", "object": None}),
    "half a line": b'{"type":"MODIFIED","object":{"metadata":{"na',
    "half a line of text": b'{"type":"MODIFIED","object":{"metadata":{"na\n',
    "html": _html(b""),
    "null": said(None),
    "a list": said([]),
    "an event of no type": said({"object": {}}),
    "an event of an unknown type": said({"type": "CHANGED", "object": {"metadata": {}}}),
    "an object without metadata": said({"type": "ADDED", "object": {}}),
    "an object of metadata null": said({"type": "ADDED", "object": {"metadata": None}}),
    "a bookmark of metadata null": said({"type": "BOOKMARK", "object": {"metadata": None}}),
    "a bookmark without an object": said({"type": "BOOKMARK"}),
    "an object nested too deep": f'{{"type":"ADDED","object":{nested()}}}\n'.encode(),
    "nothing": b"",
}
"""With what a watch may end."""
