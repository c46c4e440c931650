"""What kopf is given of the API server's answers: lists and watch events that it can read, or a reason to list again.

kopf reads every list and every line of a watch with `json`, takes its shape for granted, and gives up a watch for good
on most errors. One object that is nested a thousand levels deep, a garbled line, an ERROR other than 410, a list that
took too long, or a kind that is taken away would end the process, some of them at every start anew. Here the first is
cut, and the others lead to another try. So does whatever keeps kopf from finding out which kinds there are.

What there is when a watch begins goes past kopf, which makes a task of every object: forty thousand take a minute.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from json import JSONDecodeError
from typing import Any, ClassVar

import aiohttp
from aiohttp.hdrs import RETRY_AFTER

from finetune_operator.decoding import Garbled, Json, decoded, encoded, shallow, without_managed_fields

PAUSE_SECONDS = 1.0
"""Wait before a watch that ended in nonsense begins anew: kopf would try again at once (seconds)."""
SIGN_OF_LIFE = 500
"""Of so many objects that there are when a watch begins kopf is told of one: it takes silence for a lost connection."""
RETRY_LIMIT_SECONDS = 30
"""However long a server asks to be left alone, a watch waits no longer (seconds)."""
KOPFS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
"""Refusals after which kopf itself tries again."""
DISCOVERY: Mapping[str, str] = {"api": "versions", "apis": "groups"}
"""Last part of a path at which kopf finds out which kinds there are -> key of the list there; elsewhere RESOURCES."""
RESOURCES = "resources"
ANEW = b'{"type":"ERROR","object":{"code":410}}\n'
"""What makes kopf list again."""

_log = logging.getLogger(__name__)


class ReadableResponse(aiohttp.ClientResponse):
    """An answer in which kopf finds nothing that ends it."""

    listed: ClassVar[Callable[[str, str | None, Json], None]]
    """Takes the plural of a kind, the namespace or None for all, and each object there when a watch begins."""
    begun: ClassVar[Callable[[str, str | None], None]]
    """Told of a kind, and of the namespace or None for all, that this was all there is."""
    lists_again: ClassVar[Callable[[], None]]
    """Called when kopf is made to list again: what happened meanwhile was told by no event."""
    streaming_refused: ClassVar[Callable[[], None]]
    """Called when the API server does not let a watch begin with all objects."""
    _refused = 0
    """HTTP status of a refusal that kopf is not told of."""

    @property
    def headers(self) -> Any:
        """As aiohttp's; how long kopf is to leave the server alone is a number, and none of hours."""
        if self.status != HTTPStatus.TOO_MANY_REQUESTS:
            return self._headers
        headers = self._headers.copy()
        headers[RETRY_AFTER] = _wait(self._headers.get(RETRY_AFTER, ""))
        return headers

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """As aiohttp's, with a status and a content that do not end kopf.

        Raises:
            ClientConnectionError: it is no HTTP, or the connection broke; kopf tries again.
        """
        try:
            await super().start(connection)
        except aiohttp.ClientResponseError as error:
            raise aiohttp.ClientConnectionError(f"The API server's answer is no HTTP: {error.message}") from error
        query = self.url.query
        is_watch, is_list = query.get("watch") == "true", "limit" in query
        if not (is_watch or is_list):
            await self._check_discovery()
            return self
        if self.status == HTTPStatus.NOT_FOUND:
            # kopf gives up a watch whose kind is gone; one that is out of service it waits for.
            self.status = HTTPStatus.SERVICE_UNAVAILABLE
        elif HTTPStatus.BAD_REQUEST <= self.status < HTTPStatus.INTERNAL_SERVER_ERROR and self.status not in KOPFS:
            self._refused, self.status = self.status, HTTPStatus.OK
            if "sendInitialEvents" in query:
                type(self).streaming_refused()
        if is_watch:
            lines = _Lines(self.content, self._refused, self._take, self._tell_begun, type(self).lists_again)
            lines.begins = "sendInitialEvents" in query
            self.content = lines  # type: ignore[assignment]
        return self

    async def json(self, **_: Any) -> Any:
        """The answer's object; its items without managedFields.

        Raises:
            JSONDecodeError: it is a refusal in other words than Kubernetes' own. kopf goes by its status alone.
            ClientPayloadError: it cannot be read, which kopf takes for a broken connection, and lists again.
        """
        if self.status >= HTTPStatus.BAD_REQUEST:
            return await self._refusal()
        try:
            found = await decoded(await self.read())
            if self._refused:
                raise Garbled(f"it was refused with HTTP status {self._refused}")  # noqa: TRY301
            if "limit" in self.url.query and self.status == HTTPStatus.OK:
                found = _list(found)
                for item in found["items"]:
                    self._take(item)
                found["items"] = []
                if not found["metadata"].get("continue"):
                    self._tell_begun()
        except Garbled as error:
            _log.warning("A list cannot be read and begins anew: %s", error)
            await asyncio.sleep(PAUSE_SECONDS)
            raise aiohttp.ClientPayloadError(f"The API server's answer cannot be read: {error}") from error
        return found

    async def text(self, encoding: str | None = None, errors: str = "replace") -> str:
        """As aiohttp's, of any bytes."""
        return await super().text(encoding, errors)

    async def _refusal(self) -> dict[str, Any]:
        """What is said of a refusal. Load balancers and API Priority and Fairness say it in text or HTML.

        Raises:
            JSONDecodeError: not so that kopf could read it.
        """
        found = await self._said()
        if not isinstance(found, dict):
            raise JSONDecodeError("It is no Status", "", 0)
        return found

    async def _said(self) -> Json:
        """What the whole answer says; None for nothing that can be read."""
        try:
            return await decoded(await self.read())
        except Garbled:
            return None
        except aiohttp.ClientError:  # it broke off
            self._body = b""
            return None

    async def _check_discovery(self) -> None:
        """Have kopf ask again where it is not told which kinds there are: it asks once, and ends without."""
        if self.status in KOPFS or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return
        key = DISCOVERY.get(self.url.name, RESOURCES)
        if self.status == HTTPStatus.NOT_FOUND and key == RESOURCES:
            return  # the last kind of a group was taken away, which kopf knows
        found = await self._said()
        if self.status == HTTPStatus.OK and isinstance(found, dict) and isinstance(found.get(key), list):
            return
        _log.warning("Which kinds there are is asked again: %s was answered with %s.", self.url.path, self.status)
        self.status = HTTPStatus.SERVICE_UNAVAILABLE

    def _place(self) -> tuple[str, str | None]:
        """Plural of the kind that was asked for, and the namespace or None for all."""
        path, _, kind = self.url.path.rpartition("/")
        before, _, namespace = path.rpartition("/namespaces/")
        return kind, namespace if before else None

    def _tell_begun(self) -> None:
        type(self).begun(*self._place())

    def _take(self, item: Json) -> None:
        try:
            type(self).listed(*self._place(), item)
        except Exception:  # it costs only itself; the next resync reads it
            _log.exception("An object that is listed cannot be taken in: %s", item["metadata"]["name"])


class _Lines:
    """The content of a watch's answer. All but its lines is the original's."""

    def __init__(
        self,
        content: aiohttp.StreamReader,
        refused: int,
        take: Callable[[Json], None],
        tell_begun: Callable[[], None],
        lists_again: Callable[[], None],
    ) -> None:
        self._content = content
        self._refused = refused
        self._take = take
        self._tell_begun = tell_begun
        self._lists_again = lists_again
        self._taken = 0
        self.begins = False
        """It is to tell of all objects first. They come in no order of their versions, so that kopf cannot go on from
        the last one where it breaks off."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        """Whole lines that can be read; after one that cannot, kopf is made to list again."""
        begun: list[bytes] = []
        started, told = time.monotonic(), False
        try:
            if self._refused:
                raise Garbled(f"it was refused with HTTP status {self._refused}")  # noqa: TRY301
            async for data in self._content.iter_any():
                *whole, rest = data.split(b"\n")
                for line in whole:
                    readable = await self._readable(b"".join([*begun, line]))
                    if readable:
                        yield readable
                    told = True
                    begun.clear()
                if rest:
                    begun.append(rest)
            if self.begins:
                raise Garbled("it broke off before it had told of all objects")  # noqa: TRY301
            if not told and time.monotonic() - started < PAUSE_SECONDS:
                # kopf would ask again at once, hundreds of times a second.
                await asyncio.sleep(PAUSE_SECONDS)
        except aiohttp.ClientError:
            if not self.begins:
                raise
            self._lists_again()
            yield ANEW
        except Garbled as error:
            _log.warning("A watch begins anew: %s", error)
            await asyncio.sleep(PAUSE_SECONDS)
            self._lists_again()
            yield ANEW

    async def _readable(self, line: bytes) -> bytes:
        """An event of a watch, empty where it goes past kopf.

        Raises:
            Garbled: it is none, or says that the watch is at its end.
        """
        if not line:
            return b""
        event = await decoded(line)
        item = event.get("object") if isinstance(event, dict) else None
        if not isinstance(item, dict):
            raise Garbled("it said what is no event")
        kind = event.get("type")
        if kind == "ERROR":
            raise Garbled(str(item.get("message") or "it ended with an error"))
        if kind == "BOOKMARK" and isinstance(item.get("metadata"), dict):
            if self.begins:
                self._tell_begun()
            self.begins = False  # kopf goes by the first one, too
        elif not (kind in ("ADDED", "MODIFIED", "DELETED") and _is_object(item)):
            raise Garbled("it said what is no event")
        without_managed_fields(item)
        if self.begins and kind == "ADDED":
            # All of them, for this is told to be everything before kopf's handlers have run.
            self._take(item)
            self._taken += 1
            if self._taken % SIGN_OF_LIFE:
                return b""
        try:
            return encoded(event) + b"\n"
        except Garbled:  # deeper than what can be written, which is less than what can be read
            event = await shallow(line)
            without_managed_fields(event["object"])
            return encoded(event) + b"\n"


def _list(found: Any) -> dict[str, Any]:
    """A list without what kopf cannot name.

    Raises:
        Garbled: it is none.
    """
    metadata, items = (found.get("metadata"), found.get("items", ())) if isinstance(found, dict) else (None, None)
    token = metadata.get("continue") or "" if isinstance(metadata, dict) and metadata else None
    if not isinstance(token, str) or not (items is None or isinstance(items, list)):
        raise Garbled("it is no list")
    kept = [without_managed_fields(item) for item in items or () if _is_object(item)]
    return {**found, "items": kept}


def _wait(asked: str) -> str:
    return str(int(min(float(asked), RETRY_LIMIT_SECONDS))) if asked.isdecimal() else "1"


def _is_object(item: Any) -> bool:
    metadata = item.get("metadata") if isinstance(item, dict) else None
    return isinstance(metadata, Mapping) and all(
        isinstance(metadata.get(key), str) for key in ("uid", "name", "resourceVersion")
    )
