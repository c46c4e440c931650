"""What kopf needs so that it watches for ever, whatever an API server or a tenant sends; each part says why.

Of kopf only the watching is used: no finalizers, no annotations, no state in the objects, no peering.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kopf

from finetune_operator.cluster import LIVE_PODS
from finetune_operator.names import JOB_UID_LABEL, PODS_PLURAL, PYTORCH_GROUP, PYTORCH_PLURAL

BACKOFF_LIMIT_SECONDS = 30.0
LOGIN_LASTS_SECONDS = 60.0
"""A login is good that is followed by none for this long (seconds)."""
LEFTOVER_SECONDS = 0.2
"""Wait between two cancellations of what kopf leaves behind (seconds)."""
STREAMED_LISTS_SINCE = 34
"""Minor version of Kubernetes from which on a watch can begin with all objects, one by one instead of in pages."""
NO_FINALIZER = "none of this operator's"
"""A finalizer that no object has: the API server takes no spaces in one."""
PAGE = 5
"""Objects of a page where lists are not streamed. kopf asks for the same number from the first page to the last, reads
a page whole, and three watches begin at once. Each object may have 1.5 MB, which become 25 MB of Python's. Twenty
thousand jobs come in 4,000 pages: a few seconds of a start, or 20 where the API server takes 5 ms for each."""
_KOPF = Path(kopf.__file__).parent


def kopf_settings(*, minor_version: int) -> kopf.OperatorSettings:
    """How kopf watches an API server of that minor version."""
    settings = kopf.OperatorSettings()
    settings.persistence.diffbase_storage = _NoDiffs()
    # kopf removes its own from whatever it watches, such as a pod to which another operator made with kopf gave it. We
    # have no right to do so, and kopf does not tell of an object's events for minutes after it was refused.
    settings.persistence.finalizer = NO_FINALIZER
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30.0
    settings.networking.connect_timeout = 10.0
    settings.networking.error_backoffs = _EndlessBackoff()
    settings.watching.inactivity_timeout = 70.0
    settings.watching.server_timeout = 300  # whole: the API server refuses "300.0"
    settings.watching.initial_streaming = minor_version >= STREAMED_LISTS_SINCE
    settings.watching.chunk_size = PAGE
    for kind in (f"{PYTORCH_PLURAL}.{PYTORCH_GROUP}", PODS_PLURAL):
        settings.watching.label_selectors[kind] = JOB_UID_LABEL
    settings.watching.field_selectors[PODS_PLURAL] = LIVE_PODS
    settings.queueing.idle_timeout = 0.05  # kopf keeps each object and a task for it so long after its last event
    settings.queueing.exit_timeout = 0.5
    settings.queueing.error_delays = (0.0,)  # events that come within kopf's own, of up to 610 s, are lost
    return settings


class _EndlessBackoff:
    """Waits between tries to reach the API server: growing, with jitter. kopf's own end, and kopf with them."""

    def __iter__(self) -> Iterator[float]:
        wait = 0.5
        while True:
            yield wait * random.uniform(0.5, 1.0)
            wait = min(BACKOFF_LIMIT_SECONDS, wait * 2)


class LoginPace:
    """Keeps logins apart that follow each other: kopf logs in again whenever its token is refused, without a pause."""

    def __init__(self) -> None:
        self._wait = 0.0
        self._last = float("-inf")

    async def keep(self) -> None:
        """Wait for the turn of the next login, the longer the more have followed each other."""
        clock = asyncio.get_running_loop().time
        follows = clock() - self._last < LOGIN_LASTS_SECONDS
        self._wait = min(BACKOFF_LIMIT_SECONDS, max(1.0, 2 * self._wait)) if follows else 0.0
        await asyncio.sleep(self._wait)
        self._last = clock()


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
