"""A look over everything, at start and every few minutes: finds what no event told, and proves that events still come.

Only metadata is listed, and only of what is not known as it is listed is anything read: twenty thousand jobs that rest
cost a page of their names now and then.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from finetune_api.status import FineTuneJobStatus
from finetune_operator.cache import Cache
from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError, HistoryRewound, NotFound
from finetune_operator.names import (
    ATTEMPT_LABEL,
    FINETUNE_PLURAL,
    JOB_NAME_LABEL,
    PODS_PLURAL,
    PYTORCH_PLURAL,
)
from finetune_operator.policy.conditions import is_finished
from finetune_operator.policy.observed import is_owned
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.serving.health import Heartbeat, Watch
from finetune_operator.wire import Raw

RETRY_SECONDS = 5.0
"""Wait after a resync that failed (seconds)."""
ON_ITS_WAY_SECONDS = 5.0
"""Time that an event may take after the last that came (seconds): what is only missing for that long is not missed."""
ASKED_SECONDS = 1.0
"""Wait before a resync that was asked for: the watch that missed something lists anew itself (seconds)."""
START_SECONDS = 120.0
"""A start waits no longer for the watches, however they get on: one may list again and again (seconds)."""
POLL_SECONDS = 0.1
JITTER = 0.1
PAGES_PER_PERIOD = 300
"""Pages of one kind that a resync may spread over its period: it is to be no load of its own."""
PAUSE_SECONDS = 1.0
"""Longest pause between two pages (seconds)."""
SPREAD_SECONDS = 120.0
"""After this long a list is read without pauses: the API server keeps its place for five minutes only (seconds)."""
REWOUND = (
    "The API server has an older {} {}/{} than it once had, as after its store was restored from a "
    "backup: everything is read anew."
)
KINDS = (FINETUNE_PLURAL, PYTORCH_PLURAL, PODS_PLURAL)

_log = logging.getLogger(__name__)


class Resync:
    """Looks over everything.

    Args:
        cluster: the API server.
        namespaces: where the jobs are; None stands for all.
        period_seconds: time between two resyncs (seconds).
        queue: where jobs are put of which something was missed.
        cache: what is known.
        heartbeat: told of what no event had told.
        synced: called once, when everything is known for the first time.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespaces: tuple[str | None, ...],
        *,
        period_seconds: float,
        queue: WorkQueue,
        cache: Cache,
        heartbeat: Heartbeat,
        synced: Callable[[], object] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._namespaces = namespaces
        self._period_seconds = period_seconds
        self._queue = queue
        self._cache = cache
        self._heartbeat = heartbeat
        self._synced = synced
        self._asked = asyncio.Event()
        self._begun: set[Watch] = set()
        self._told = 0
        """Objects that watches have told of while they began."""

    def soon(self) -> None:
        """Resync without waiting for the period: events may have been missed."""
        self._asked.set()

    def watch_tells(self, kind: str, namespace: str | None) -> None:
        """A watch tells of one more object that there was when it began: it gets on."""
        if (kind, namespace) not in self._begun:
            self._told += 1

    def watch_begun(self, kind: str, namespace: str | None) -> None:
        """A watch has told of everything that there is: of a kind, in a namespace or (None) all."""
        self._begun.add((kind, namespace))

    async def run(self) -> None:
        """Resync until cancelled."""
        pause_seconds = 0.0  # nobody waits for a resync but the first
        is_known = await self._watches_begin()
        while True:
            wait = self._period_seconds * (1 + random.uniform(-JITTER, JITTER))
            if not is_known:
                self._asked.clear()  # before it: what is asked for while it runs may be of what it has read already
            if is_known or await self.once(pause_seconds=pause_seconds):
                pause_seconds = min(PAUSE_SECONDS, self._period_seconds / PAGES_PER_PERIOD)
            else:
                pause_seconds = 0.0  # a list that takes too long fails, and would again
                wait = min(RETRY_SECONDS, self._period_seconds)
            is_known = False
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._asked.wait()
                    await asyncio.sleep(ASKED_SECONDS)

    async def once(self, *, pause_seconds: float = 0.0) -> bool:
        """Look over everything once; whether any of the namespaces could be listed.

        Args:
            pause_seconds: wait between two pages (seconds).

        Raises:
            HistoryRewound: the API server's store was restored from a backup.
        """
        listed: list[str | None] = []
        missed: dict[Watch, int] = {}
        for namespace in self._namespaces:
            try:
                for kind in KINDS:
                    missed[kind, namespace] = await self._compare(kind, namespace, pause_seconds)
            except ApiError as error:
                # One that is gone, or not ours any more, is no reason to leave the others alone.
                _log.warning("The namespace %s could not be looked over: %s", namespace or "(all)", error)
            else:
                listed.append(namespace)
        if listed:
            self._succeeded(missed)
        return bool(listed)

    async def _watches_begin(self) -> bool:
        """Wait until the watches have told of everything, as long as those get on that have not; whether all have.

        What they tell first is a list. To list all of it once more would be most of the work of a start. One that
        cannot begin, because its kind or the permission is missing, does not keep the others from being looked after.
        """
        awaited = {(kind, namespace) for kind in KINDS for namespace in self._namespaces}
        clock = asyncio.get_running_loop().time
        until = clock() + min(START_SECONDS, max(ON_ITS_WAY_SECONDS, self._period_seconds))
        waited, told = 0.0, 0
        while not awaited <= self._begun:
            if waited >= ON_ITS_WAY_SECONDS or clock() >= until:
                return False
            await asyncio.sleep(POLL_SECONDS)
            waited = waited + POLL_SECONDS if told == self._told else 0.0
            told = self._told
        self._succeeded({})
        return True

    def _succeeded(self, missed: Mapping[Watch, int]) -> None:
        self._heartbeat.resynced(missed)
        if not self._cache.synced:
            self._cache.synced = True
            self._synced()
            for key in self._cache.unfinished():
                self._queue.add(key)

    async def _compare(self, kind: str, namespace: str | None, pause_seconds: float) -> int:
        """Reconcile what is not known as it is listed, or not listed as it is known; how much that was.

        Raises:
            ApiError: the API server refused or did not answer.
            HistoryRewound: what is listed is older than what was known before.
        """
        newest = self._cache.newest(kind)
        clock = asyncio.get_running_loop().time
        spread_until = clock() + SPREAD_SECONDS
        names: set[tuple[str, str]] = set()
        unknown: list[Raw] = []
        strays: list[Raw] = []
        try:
            async for page in self._cluster.list_metadata(kind, namespace):
                if names:
                    await asyncio.sleep(max(0.0, min(pause_seconds, spread_until - clock())))
                for item in page:
                    metadata = item["metadata"]
                    names.add((metadata["namespace"], metadata["name"]))
                    if self._cache.is_rewound(kind, item, newest):
                        raise HistoryRewound(REWOUND.format(kind, metadata["namespace"], metadata["name"]))
                    if not self._cache.is_current(kind, item):
                        unknown.append(item)
                    elif kind == PYTORCH_PLURAL and self._may_be_stray(item):
                        strays.append(item)
        except NotFound:
            return 0  # without the training operator there are none
        unknown = await self._unannounced(kind, unknown)
        for item in unknown:
            self._read_anew(kind, item["metadata"])
        gone = self._gone(kind, namespace, names, newest)
        for key in gone:
            self._queue.add(key)
        await self._delete_strays(strays)
        return len(unknown) + len(gone)

    async def _unannounced(self, kind: str, unknown: list[Raw]) -> list[Raw]:
        """Those of which no event has told, although it had time to come."""
        waited = 0.0
        unknown.reverse()  # a watch tells of what there is in the order of a list
        while unknown and waited < ON_ITS_WAY_SECONDS:
            await asyncio.sleep(POLL_SECONDS)
            waited, before = waited + POLL_SECONDS, len(unknown)
            while unknown and self._cache.is_current(kind, unknown[-1]):
                unknown.pop()
            if waited >= ON_ITS_WAY_SECONDS:
                unknown = [item for item in unknown if not self._cache.is_current(kind, item)]
            if len(unknown) < before:
                waited = 0.0
        return unknown

    def _read_anew(self, kind: str, metadata: dict[str, Any]) -> None:
        if kind == FINETUNE_PLURAL:
            key = Key(metadata["namespace"], metadata["name"])
            cached = self._cache.find(key)
            if cached is not None:
                cached.raw, cached.done = None, False
        else:
            labels = metadata["labels"]
            key = Key(metadata["namespace"], labels[JOB_NAME_LABEL])
            cached = self._cache.find(key)
            if cached is not None:
                self._cache.children(key, cached.uid).doubts += 1
        self._queue.add(key)

    def _gone(self, kind: str, namespace: str | None, names: set[tuple[str, str]], newest: str) -> Sequence[Key]:
        """Jobs that are not there any more, or of which a child is not."""
        if kind != FINETUNE_PLURAL:
            return list(self._cache.keep_only(kind, (namespace,), names, newest))
        gone = self._cache.unlisted(namespace, names, newest)
        for key in gone:
            cached = self._cache.find(key)
            if cached is not None:
                cached.raw = None
        return gone

    def _may_be_stray(self, raw: Raw) -> bool:
        metadata = raw["metadata"]
        cached = self._cache.find(Key(metadata["namespace"], (metadata.get("labels") or {}).get(JOB_NAME_LABEL, "")))
        if cached is None or not is_owned(raw, cached.uid) or "deletionTimestamp" in metadata:
            return False
        return cached.newest_attempt is not None and _attempt(raw) not in (None, cached.newest_attempt)

    async def _delete_strays(self, strays: Sequence[Raw]) -> None:
        for raw in strays:
            try:
                await self._delete_stray(raw)
            except (ApiError, ValueError) as error:  # also a status that is none of ours
                # One that a policy protects is no reason to leave the others alone.
                where = f"{raw['metadata']['namespace']}/{raw['metadata']['name']}"
                _log.warning("The PyTorchJob %s, whose attempt is over, could not be deleted: %s", where, error)

    async def _delete_stray(self, raw: Raw) -> None:
        """Delete a PyTorchJob of ours that belongs to no attempt of its job: an operator that stood still made it
        long after its attempt had ended, or was stopped just after it had made it and the job has ended since."""
        metadata = raw["metadata"]
        job = await self._cluster.get_job(metadata["namespace"], metadata["labels"][JOB_NAME_LABEL])
        if job is None or not is_owned(raw, job["metadata"]["uid"]):
            return
        status = FineTuneJobStatus.model_validate(job.get("status") or {})
        number = _attempt(raw)
        if status.attempt is None or number is None or number == status.attempt:
            return
        if number < status.attempt or is_finished(status):
            await self._cluster.delete_pytorch_job(metadata["namespace"], metadata["name"], uid=metadata["uid"])


def _attempt(raw: Raw) -> int | None:
    text = (raw["metadata"].get("labels") or {}).get(ATTEMPT_LABEL, "")
    return int(text) if text.isdecimal() else None
