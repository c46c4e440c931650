"""kopf's part: three watches whose every event goes to the cache. Nothing is decided or written here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import kopf

from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError
from finetune_operator.kopf_defences import EveryTask, LoginPace, end_leftovers, kopf_settings
from finetune_operator.names import (
    FINETUNE_GROUP,
    FINETUNE_PLURAL,
    FINETUNE_VERSION,
    JOB_UID_LABEL,
    MANAGER,
    PODS_PLURAL,
    PYTORCH_GROUP,
    PYTORCH_PLURAL,
    PYTORCH_VERSION,
)
from finetune_operator.watch_answers import ReadableResponse
from finetune_operator.wire import Raw

LOGIN_LIFE = timedelta(minutes=30)
"""A pod's token is replaced every hour; kopf then asks again."""
_IDENTITY: Any = MANAGER
"""For operators that share work, which ours do not; kopf's own has the user's name in it, which an image may lack."""

_log = logging.getLogger(__name__)

Sink = Callable[[str, Raw, bool], None]
"""Takes the plural of a kind, an object, and whether it was deleted."""


def registry(sink: Sink, login: Callable[[], Awaitable[kopf.AiohttpSession]]) -> kopf.OperatorRegistry:
    """The three watches, whose events `sink` takes in their order."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def authenticate(**_: Any) -> kopf.AiohttpSession:
        return await login()

    @kopf.on.event(FINETUNE_GROUP, FINETUNE_VERSION, FINETUNE_PLURAL, registry=handlers)
    async def job_event(event: kopf.RawEvent, **_: Any) -> None:
        sink(FINETUNE_PLURAL, dict(event["object"]), event["type"] == "DELETED")

    @kopf.on.event(PYTORCH_GROUP, PYTORCH_VERSION, PYTORCH_PLURAL, registry=handlers)
    async def pytorch_job_event(event: kopf.RawEvent, **_: Any) -> None:
        sink(PYTORCH_PLURAL, dict(event["object"]), event["type"] == "DELETED")

    @kopf.on.event("", "v1", PODS_PLURAL, labels={JOB_UID_LABEL: kopf.PRESENT}, registry=handlers)
    async def pod_event(event: kopf.RawEvent, **_: Any) -> None:
        sink(PODS_PLURAL, dict(event["object"]), event["type"] == "DELETED")

    return handlers


async def watch(
    cluster: Cluster,
    sink: Sink,
    namespaces: tuple[str, ...],
    stop: asyncio.Event,
    *,
    tells: Callable[[str, str | None], None],
    begun: Callable[[str, str | None], None],
    lists_again: Callable[[], None],
) -> None:
    """Watch until `stop` is set or a signal comes.

    Args:
        cluster: the API server.
        sink: takes every event.
        namespaces: where to watch; none for everywhere.
        stop: ends it.
        tells: called with a kind, and a namespace or None for all, for each object told of as a watch begins.
        begun: called likewise once everything was told that there is of it.
        lists_again: called when a watch begins anew after a gap of which no event tells.

    Raises:
        Exception: a watch died; the process must end, because kopf starts no new one.
    """
    settings = kopf_settings(minor_version=await _minor_version(cluster))

    def stream_no_lists() -> None:
        _log.warning("The API server refuses to stream lists: they are read in pages.")
        settings.watching.initial_streaming = False

    class Response(ReadableResponse):
        """Of these watches."""

    def listed(kind: str, namespace: str | None, raw: Raw) -> None:
        tells(kind, namespace)
        sink(kind, raw, False)

    Response.listed, Response.begun = staticmethod(listed), staticmethod(begun)
    Response.lists_again, Response.streaming_refused = staticmethod(lists_again), staticmethod(stream_no_lists)

    pace = LoginPace()

    async def login() -> kopf.AiohttpSession:
        await pace.keep()
        try:
            headers = await cluster.wire.authorization()
        except ApiError as error:
            raise kopf.TemporaryError(str(error), delay=0) from error  # `pace` waits; kopf would for a minute
        session: aiohttp.ClientSession = cluster.wire.session(headers=headers, response_class=Response)
        expiration = datetime.now(UTC) + LOGIN_LIFE
        return kopf.AiohttpSession(server=cluster.wire.server, aiohttp_session=session, expiration=expiration)

    tasks = await kopf.spawn_tasks(
        registry=registry(sink, login),
        settings=settings,
        clusterwide=not namespaces,
        namespaces=namespaces,
        standalone=True,
        identity=_IDENTITY,
        stop_flag=stop,
    )
    try:
        await kopf.run_tasks(tasks, ignored=EveryTask())
    finally:
        await end_leftovers()


async def _minor_version(cluster: Cluster) -> int:
    try:
        return await cluster.minor_version()
    except ApiError as error:
        _log.warning("The API server does not tell its version, so it is taken for an old one: %s", error)
        return 0
