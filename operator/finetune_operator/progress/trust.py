"""Puts the certificate that trainers trust the progress endpoint by into the namespaces of jobs.

Progress is never worth a training run: whatever goes wrong is one sentence for the log, is found within seconds, and
is not tried again for every job.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any, Protocol

from finetune_operator.errors import ApiError, Conflict, Forbidden, Invalid, NotFound, SetupProblem
from finetune_operator.names import MANAGED_BY_LABEL, MANAGER
from finetune_operator.progress.bundle import merged

CHECK_SECONDS = 600.0
"""After this long a namespace's ConfigMap is looked at again, when a job there begins an attempt."""
RETRY_SECONDS = 60.0
"""After this long it is tried again where it failed."""
LIMIT_SECONDS = 5.0
"""How long an attempt waits for the certificate of its namespace."""
ALL_LIMIT_SECONDS = 60.0
"""How long all namespaces together may take; the rest has its turn the next time."""
CONFLICTS = 10
"""Times that an object is read again because somebody else wrote it in the meantime."""

Object = dict[str, Any]

_log = logging.getLogger(__name__)


class ConfigMapClient(Protocol):
    """What is needed of the API server. Objects are raw; failures are finetune_operator.errors.ApiError."""

    async def get_config_map(self, namespace: str, name: str) -> Object | None:
        """The ConfigMap, or None."""

    async def create_config_map(self, namespace: str, body: Object) -> Object:
        """Create it; Conflict when there is one."""

    async def update_config_map(self, namespace: str, body: Object) -> Object:
        """Replace it; Conflict when `metadata.resourceVersion` is no longer the newest."""


class Trust:
    """The ConfigMaps with the certificate.

    Args:
        client: the API server.
        config_map: their name.
        key: our key in them.
        certificates: PEM of what is to be trusted; may raise SetupProblem or ApiError.
        now: wall clock, UTC.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: ConfigMapClient,
        *,
        config_map: str,
        key: str,
        certificates: Callable[[], Awaitable[bytes]],
        now: Callable[[], datetime],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._config_map = config_map
        self._key = key
        self._certificates = certificates
        self._now = now
        self._clock = clock
        self._done: dict[str, float] = {}
        """When a namespace was last seen with the right certificates."""
        self._failed: dict[str, tuple[float, str]] = {}
        """Until when a namespace is not tried again, and why."""
        self._busy: dict[str, asyncio.Lock] = {}

    def outdated(self) -> None:
        """There are new certificates, which no namespace has yet."""
        self._done.clear()

    async def ensure(self, namespace: str) -> None:
        """See to it that pods in `namespace` can mount the certificates.

        Raises:
            SetupProblem: that cannot be done now, whatever the reason is.
        """
        busy = self._busy.setdefault(namespace, asyncio.Lock())
        try:
            async with busy:
                await self._ensure(namespace)
        finally:
            if not busy.locked():
                self._busy.pop(namespace, None)

    async def ensure_everywhere(self, namespaces: Iterable[str]) -> None:
        """As `ensure`, where it has not been done since there are these certificates; problems go to the log.

        Args:
            namespaces: those in which an attempt is open, which trusts what it finds there while it runs.
        """
        wanted = set(namespaces)
        now = self._clock()
        self._done = {name: at for name, at in self._done.items() if name in wanted or now - at < CHECK_SECONDS}
        self._failed = {name: kept for name, kept in self._failed.items() if now < kept[0]}
        try:
            async with asyncio.timeout(ALL_LIMIT_SECONDS):
                for namespace in sorted(wanted - self._done.keys() - self._failed.keys()):
                    try:
                        await self.ensure(namespace)
                    except SetupProblem as problem:
                        _log.warning("Jobs in namespace %s may show no progress: %s", namespace, problem)
        except TimeoutError:
            _log.warning("The certificate of the progress endpoint is not in all namespaces yet; the rest comes later.")

    async def _ensure(self, namespace: str) -> None:
        now = self._clock()
        if now - self._done.get(namespace, float("-inf")) < CHECK_SECONDS:
            return
        until, sentence = self._failed.get(namespace, (now, ""))
        if now < until:
            raise SetupProblem(sentence)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                await self._write(namespace, (await self._read_certificates()).decode())
        except (SetupProblem, TimeoutError) as error:
            where = f"{namespace}/{self._config_map}"
            slow = (
                f"ConfigMap {where} could not be written within {LIMIT_SECONDS:g} s: see that the API server and its "
                "admission webhooks answer; the operator tries again by itself."
            )
            sentence = str(error) if isinstance(error, SetupProblem) else slow
            self._failed[namespace] = self._clock() + RETRY_SECONDS, sentence
            raise SetupProblem(sentence) from error
        self._done[namespace] = self._clock()
        self._failed.pop(namespace, None)

    async def _read_certificates(self) -> bytes:
        try:
            return await self._certificates()
        except ApiError as error:
            raise SetupProblem(
                f"The Secret with the certificate authority cannot be read or written ({error}): see that the "
                "operator's role in its own namespace allows it and that the API server answers."
            ) from error

    async def _write(self, namespace: str, ours: str) -> None:
        what = f"ConfigMap {namespace}/{self._config_map}"
        try:
            for _ in range(CONFLICTS):
                try:
                    await self._write_once(namespace, ours, what)
                except Conflict:
                    continue
                return
        except ApiError as error:
            raise SetupProblem(f"{what} {_cause(error)}") from error
        raise SetupProblem(f"{what} is changed again and again; find out who writes it.")

    async def _write_once(self, namespace: str, ours: str, what: str) -> None:
        found = await self._client.get_config_map(namespace, self._config_map)
        if found is None:
            metadata = {"name": self._config_map, "namespace": namespace, "labels": {MANAGED_BY_LABEL: MANAGER}}
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
            data = merged(None, self._key, ours, self._now())
            await self._client.create_config_map(namespace, {**body, "data": data})
            return
        if ((found.get("metadata") or {}).get("labels") or {}).get(MANAGED_BY_LABEL) != MANAGER:
            raise SetupProblem(
                f"{what} exists and is not the operator's; rename or delete it, since trainers find the certificate of "
                "the progress endpoint under that name."
            )
        data = merged(found.get("data"), self._key, ours, self._now())
        if found.get("data") == data:
            return
        if found.get("immutable"):
            raise SetupProblem(
                f"{what} is immutable and does not hold the present certificates; delete it, and the operator writes "
                "it anew."
            )
        await self._client.update_config_map(namespace, {**found, "data": data})


def _cause(error: ApiError) -> str:
    """What an answer of the API server means for something that is to be written, and what to do."""
    match error:
        case NotFound():
            return f"cannot be written ({error}): is its namespace gone?"
        case Forbidden() if "being terminated" in error.message:
            return "cannot be written, since its namespace is being deleted."
        case Forbidden():
            return f"may not be written ({error}): see that the operator's role and the admission policies allow it."
        case Invalid():
            return f"is refused by the API server ({error}): correct the admission policy that changes or refuses it."
        case _:
            return (
                f"cannot be written now ({error}): see that the API server and its admission webhooks answer; the "
                "operator tries again by itself."
            )
