"""kopf's part: three watches whose every event names a key for the queue. Nothing is decided or written here.

Of kopf only the watching is used: no finalizers, no annotations, no state in the objects, no peering.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kopf

from finetune_operator.cluster import Credentials
from finetune_operator.memory import Memory
from finetune_operator.names import (
    FINETUNE_GROUP,
    FINETUNE_PLURAL,
    FINETUNE_VERSION,
    JOB_NAME_LABEL,
    JOB_UID_LABEL,
    MANAGER,
    PYTORCH_GROUP,
    PYTORCH_PLURAL,
    PYTORCH_VERSION,
)
from finetune_operator.queue import Key
from finetune_operator.resync import JOBS, Dispatcher, child_ended
from finetune_operator.serving.health import Heartbeat

LOGIN_LIFE = timedelta(minutes=30)
"""A pod's token is replaced every hour; kopf then asks again."""
BACKOFF_LIMIT_SECONDS = 30.0
LEFTOVER_SECONDS = 0.2
"""Wait between two cancellations of what kopf leaves behind (seconds)."""
_KOPF = Path(kopf.__file__).parent


class _EndlessBackoff:
    """Waits between tries to reach the API server: growing, with jitter, and never at an end."""

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


class _Everything(frozenset[asyncio.Task[Any]]):
    """Contains every task. When kopf ends it waits for all tasks that are younger than itself and then cancels them:
    also those of our servers, and of looks at jobs, which have to go on when the watches alone begin anew.
    """

    def __contains__(self, _: object) -> bool:
        return True


def kopf_settings() -> kopf.OperatorSettings:
    """How kopf watches."""
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
    settings.watching.chunk_size = 100  # with whole objects: five times as many made a start need twice the memory
    for kind in (f"{PYTORCH_PLURAL}.{PYTORCH_GROUP}", "pods"):
        settings.watching.label_selectors[kind] = JOB_UID_LABEL
    settings.queueing.idle_timeout = 0.05  # kopf keeps each object and a task for it so long after its last event
    settings.queueing.exit_timeout = 0.5
    return settings


def registry(
    dispatcher: Dispatcher,
    memory: Memory,
    heartbeat: Heartbeat,
    *,
    forget: Callable[[Key], None],
    credentials: Callable[[], Any],
) -> kopf.OperatorRegistry:
    """The three watches.

    Args:
        dispatcher: what is to be done about what was seen.
        memory: remembers which version of a job an event has told of.
        heartbeat: told that events come.
        forget: called for a job that is gone.
        credentials: an awaitable of `cluster.Credentials`.
    """
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        found: Credentials = await credentials()
        return kopf.ConnectionInfo(
            server=found.server,
            ca_path=found.ca_path,
            insecure=found.insecure,
            scheme="Bearer" if found.token else None,
            token=found.token,
            certificate_path=found.certificate_path,
            private_key_path=found.private_key_path,
            expiration=datetime.now(UTC) + LOGIN_LIFE,
        )

    @kopf.on.event(FINETUNE_GROUP, FINETUNE_VERSION, FINETUNE_PLURAL, registry=handlers)
    async def job_event(event: kopf.RawEvent, body: kopf.Body, **_: Any) -> None:
        heartbeat.event(JOBS)
        if event["type"] == "DELETED":
            forget(Key(body["metadata"]["namespace"], body["metadata"]["name"]))
            return
        memory.job(body).announced_version = body["metadata"]["resourceVersion"]
        dispatcher.job_seen(body)

    async def child_event(body: kopf.Body, namespace: str | None, labels: kopf.Labels, **_: Any) -> None:
        if namespace and labels.get(JOB_NAME_LABEL):
            dispatcher.child_seen(namespace, labels[JOB_NAME_LABEL], ended=child_ended(body))

    kopf.on.event(PYTORCH_GROUP, PYTORCH_VERSION, PYTORCH_PLURAL, registry=handlers, id="pytorchjob")(child_event)
    kopf.on.event("", "v1", "pods", labels={JOB_UID_LABEL: kopf.PRESENT}, registry=handlers, id="pod")(child_event)
    return handlers


_IDENTITY: Any = MANAGER
"""For operators that share work, which ours do not; kopf's own has the user's name in it, which an image may lack."""


async def watch(handlers: kopf.OperatorRegistry, namespaces: tuple[str, ...], stop: asyncio.Event) -> None:
    """Watch until `stop` is set or a signal comes.

    Raises:
        Exception: a watch died; the process must end, because kopf starts no new one.
    """
    tasks = await kopf.spawn_tasks(
        registry=handlers,
        settings=kopf_settings(),
        clusterwide=not namespaces,
        namespaces=namespaces,
        standalone=True,
        identity=_IDENTITY,
        stop_flag=stop,
    )
    try:
        await kopf.run_tasks(tasks, ignored=_Everything())
    finally:
        await _end_leftovers()


async def _end_leftovers() -> None:
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
