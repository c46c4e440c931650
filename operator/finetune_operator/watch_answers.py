"""What kopf is given of the API server's answers: lists and watch events that it can read, or a reason to list again.

kopf reads every list and every line of a watch with `json`, takes its shape for granted, and gives up a watch for good
on most errors. One object that is nested a thousand levels deep, a garbled line, an ERROR other than 410, a list that
took too long, or a kind that is taken away would end the process, some of them at every start anew. Here the first is
cut, and the others lead to another try.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from typing import Any, ClassVar

import aiohttp

from finetune_operator.decoding import Garbled, decoded, encoded, without_managed_fields

PAUSE_SECONDS = 1.0
"""Wait before a watch that ended in nonsense begins anew: kopf would try again at once (seconds)."""
KOPFS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
"""Refusals after which kopf itself tries again."""
ANEW = b'{"type":"ERROR","object":{"code":410}}\n'
"""What makes kopf list again."""

_log = logging.getLogger(__name__)


class ReadableResponse(aiohttp.ClientResponse):
    """An answer in which kopf finds nothing that ends it."""

    lists_again: ClassVar[Callable[[], None]]
    """Called when kopf is made to list again: what happened meanwhile was told by no event."""
    streaming_refused: ClassVar[Callable[[], None]]
    """Called when the API server does not let a watch begin with all objects."""
    _refused = 0
    """HTTP status of a refusal that kopf is not told of."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """As aiohttp's, with a status and a content that do not end kopf."""
        await super().start(connection)
        query = self.url.query
        is_watch, is_list = query.get("watch") == "true", "limit" in query
        if not (is_watch or is_list):
            return self
        if self.status == HTTPStatus.NOT_FOUND:
            # kopf gives up a watch whose kind is gone; one that is out of service it waits for.
            self.status = HTTPStatus.SERVICE_UNAVAILABLE
        elif HTTPStatus.BAD_REQUEST <= self.status < HTTPStatus.INTERNAL_SERVER_ERROR and self.status not in KOPFS:
            self._refused, self.status = self.status, HTTPStatus.OK
            if "sendInitialEvents" in query:
                type(self).streaming_refused()
        if is_watch:
            self.content = _Lines(self.content, self._refused, type(self).lists_again)  # type: ignore[assignment]
        return self

    async def json(self, **_: Any) -> Any:
        """The answer's object; its items without managedFields.

        Raises:
            ClientPayloadError: it cannot be read, which kopf takes for a broken connection, and lists again.
        """
        try:
            found = await decoded(await self.read())
            if self._refused:
                raise Garbled(f"it was refused with HTTP status {self._refused}")  # noqa: TRY301
        except Garbled as error:
            _log.warning("A list cannot be read and begins anew: %s", error)
            await asyncio.sleep(PAUSE_SECONDS)
            raise aiohttp.ClientPayloadError(f"The API server's answer cannot be read: {error}") from error
        items = found.get("items") if isinstance(found, dict) else None
        if isinstance(items, list):
            found["items"] = [without_managed_fields(item) for item in items if _is_object(item)]
        return found


class _Lines:
    """The content of a watch's answer. All but its lines is the original's."""

    def __init__(self, content: aiohttp.StreamReader, refused: int, lists_again: Callable[[], None]) -> None:
        self._content = content
        self._refused = refused
        self._lists_again = lists_again

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        """Whole lines that can be read; after one that cannot, kopf is made to list again."""
        begun: list[bytes] = []
        try:
            if self._refused:
                raise Garbled(f"it was refused with HTTP status {self._refused}")  # noqa: TRY301
            async for data in self._content.iter_any():
                *whole, rest = data.split(b"\n")
                for line in whole:
                    yield await _readable(b"".join([*begun, line]))
                    begun.clear()
                if rest:
                    begun.append(rest)
        except Garbled as error:
            _log.warning("A watch begins anew: %s", error)
            await asyncio.sleep(PAUSE_SECONDS)
            self._lists_again()
            yield ANEW


async def _readable(line: bytes) -> bytes:
    """An event of a watch.

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
    if kind != "BOOKMARK" and not (kind in ("ADDED", "MODIFIED", "DELETED") and _is_object(item)):
        raise Garbled("it said what is no event")
    without_managed_fields(item)
    return encoded(event) + b"\n"


def _is_object(item: Any) -> bool:
    metadata = item.get("metadata") if isinstance(item, dict) else None
    return isinstance(metadata, Mapping) and all(
        isinstance(metadata.get(key), str) for key in ("uid", "name", "resourceVersion")
    )
