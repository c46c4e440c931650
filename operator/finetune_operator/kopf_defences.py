"""What kopf needs so that it watches for ever, whatever an API server or a tenant sends; each part says why.

Of kopf only the watching is used: no finalizers, no annotations, no state in the objects, no peering.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import kopf

from finetune_operator.cluster import LIVE_PODS
from finetune_operator.decoding import Garbled, decoded, encoded, without_managed_fields
from finetune_operator.names import JOB_UID_LABEL, PODS_PLURAL, PYTORCH_GROUP, PYTORCH_PLURAL

BACKOFF_LIMIT_SECONDS = 30.0
PAUSE_SECONDS = 1.0
"""Wait before a watch that ended in nonsense begins anew: kopf would try again at once (seconds)."""
LEFTOVER_SECONDS = 0.2
"""Wait between two cancellations of what kopf leaves behind (seconds)."""
STREAMED_LISTS_SINCE = 34
"""Minor version of Kubernetes from which on a watch can begin with all objects, one by one instead of in pages."""
_KOPF = Path(kopf.__file__).parent

_log = logging.getLogger(__name__)


def kopf_settings(*, minor_version: int) -> kopf.OperatorSettings:
    """How kopf watches an API server of that minor version."""
    settings = kopf.OperatorSettings()
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30.0
    settings.networking.connect_timeout = 10.0
    settings.networking.error_backoffs = _EndlessBackoff()
    settings.watching.inactivity_timeout = 70.0
    settings.watching.server_timeout = 300  # whole: the API server refuses "300.0"
    settings.watching.initial_streaming = minor_version >= STREAMED_LISTS_SINCE
    settings.watching.chunk_size = 50  # whole objects, of up to 1.5 MB each
    for kind in (f"{PYTORCH_PLURAL}.{PYTORCH_GROUP}", PODS_PLURAL):
        settings.watching.label_selectors[kind] = JOB_UID_LABEL
    settings.watching.field_selectors[PODS_PLURAL] = LIVE_PODS
    settings.queueing.idle_timeout = 0.05  # kopf keeps each object and a task for it so long after its last event
    settings.queueing.exit_timeout = 0.5
    return settings


class ReadableResponse(aiohttp.ClientResponse):
    """An answer in which kopf finds nothing that ends it.

    kopf reads every list and every line of a watch with `json` and takes its shape for granted. One object that is
    nested a thousand levels deep, a garbled line, an ERROR other than 410, or a kind that is taken away would end its
    watch, and with it the process, at every start anew. Here the first is cut, and the others lead to another try.
    """

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """As aiohttp's; the content of a watch comes in whole lines that can be read."""
        await super().start(connection)
        query = self.url.query
        if self.status == HTTPStatus.NOT_FOUND and ("watch" in query or "limit" in query):
            # kopf gives up a watch whose kind is gone; one that is out of service it waits for.
            self.status = HTTPStatus.SERVICE_UNAVAILABLE
        if query.get("watch") == "true":
            self.content = _Lines(self.content)  # type: ignore[assignment]  # all that kopf asks of it
        return self

    async def json(self, **_: Any) -> Any:
        """The answer's object; its items without managedFields.

        Raises:
            ClientPayloadError: it cannot be read, which kopf takes for a broken connection.
        """
        try:
            found = await decoded(await self.read())
        except Garbled as error:
            await asyncio.sleep(PAUSE_SECONDS)
            raise aiohttp.ClientPayloadError(f"The API server's answer cannot be read: {error}") from error
        items = found.get("items") if isinstance(found, dict) else None
        if isinstance(items, list):
            found["items"] = [without_managed_fields(item) for item in items if _is_object(item)]
        return found


class _Lines:
    """The content of a watch's answer. All but its lines is the original's."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        """Whole lines.

        Raises:
            ClientPayloadError: one makes no sense, which kopf takes for a broken connection.
        """
        begun: list[bytes] = []
        async for data in self._content.iter_any():
            *whole, rest = data.split(b"\n")
            for line in whole:
                yield await _readable(b"".join([*begun, line]))
                begun.clear()
            if rest:
                begun.append(rest)


async def _readable(line: bytes) -> bytes:
    if not line:
        return b""
    try:
        event = _checked(await decoded(line))
        if event["type"] == "ERROR":
            _log.info("A watch ended with an error and begins anew: %s", event["object"].get("message"))
            await asyncio.sleep(PAUSE_SECONDS)
            event["object"]["code"] = 410
        without_managed_fields(event["object"])
        return encoded(event) + b"\n"
    except Garbled as error:
        _log.warning("A watch said what cannot be read (%s) and begins anew.", error)
        await asyncio.sleep(PAUSE_SECONDS)
        raise aiohttp.ClientPayloadError(f"The watch event cannot be read: {error}") from error


def _checked(event: Any) -> dict[str, Any]:
    """`event`, if it is one.

    Raises:
        Garbled: it is none.
    """
    if isinstance(event, dict) and isinstance(event.get("object"), dict):
        kind = event.get("type")
        if kind in ("ERROR", "BOOKMARK") or (kind in ("ADDED", "MODIFIED", "DELETED") and _is_object(event["object"])):
            return event
    raise Garbled("it is no watch event")


def _is_object(item: Any) -> bool:
    metadata = item.get("metadata") if isinstance(item, dict) else None
    return isinstance(metadata, Mapping) and all(
        isinstance(metadata.get(key), str) for key in ("uid", "name", "resourceVersion")
    )


class _EndlessBackoff:
    """Waits between tries to reach the API server: growing, with jitter. kopf's own end, and kopf with them."""

    def __iter__(self) -> Iterator[float]:
        wait = 0.5
        while True:
            yield wait * random.uniform(0.5, 1.0)
            wait = min(BACKOFF_LIMIT_SECONDS, wait * 2)


class _NoDiffs(kopf.DiffBaseStorage):
    """kopf copies every object at every event to find out what changed, for handlers of a kind that we have none of."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:  # noqa: ARG002  kopf's
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:  # noqa: ARG002
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing is ever stored."""


class EveryTask(frozenset[asyncio.Task[Any]]):
    """Contains every task. When kopf ends it waits for all tasks that are younger than itself and then cancels them:
    also those of our servers, and of reconciles, which have to go on when the watches alone begin anew.
    """

    def __contains__(self, _: object) -> bool:
        return True


async def end_leftovers() -> None:
    """End every task of kopf's that is left.

    A watch that waits for the first byte of its answer takes its cancellation for the end of that answer and begins
    anew. One cancellation, all that asyncio gives when a process ends, would leave the process running, and blind.
    """
    while left := [task for task in asyncio.all_tasks() if _is_of_kopf(task)]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=LEFTOVER_SECONDS)


def _is_of_kopf(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and Path(code.co_filename).is_relative_to(_KOPF)
