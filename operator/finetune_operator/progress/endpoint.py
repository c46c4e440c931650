"""The HTTPS server that trainers report to, with a certificate that is replaced while it serves."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from urllib.parse import urlsplit

from aiohttp import web

from finetune_operator.errors import ApiError, SetupProblem
from finetune_operator.names import MANAGER
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.certificates import Leaf
from finetune_operator.serving.port import listening

CHECK_SECONDS = 3600.0
"""Time between two looks at the age of the certificate."""

_log = logging.getLogger(__name__)


def endpoint_hosts(progress_url: str | None, namespace: str) -> list[str]:
    """Names and addresses that trainers may reach the endpoint by: as configured, the Service's, this machine's."""
    service = f"{MANAGER}.{namespace}.svc"
    configured = urlsplit(progress_url).hostname if progress_url else None
    names = [configured, service, f"{service}.cluster.local", "localhost", "127.0.0.1", "::1"]
    return list(dict.fromkeys(name for name in names if name))


class ServerCertificate:
    """The TLS context of the endpoint, and what keeps its certificate young.

    Args:
        authority: signs it.
        hosts: see `endpoint_hosts`.
        now: wall clock, UTC.
    """

    def __init__(
        self,
        authority: CertificateAuthority,
        hosts: list[str],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._authority = authority
        self._hosts = hosts
        self._now = now
        self._renew_at: datetime | None = None
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2

    @property
    def is_due(self) -> bool:
        """Whether there is none yet or it has aged."""
        return self._renew_at is None or self._now() >= self._renew_at

    async def renew_if_due(self) -> bool:
        """Make a certificate when one is due; connections from now on see it.

        Returns:
            Whether a new one was made.

        Raises:
            SetupProblem, ApiError: as CertificateAuthority.load; the present one stays in use.
        """
        if not self.is_due:
            return False
        authorities = await self._authority.load()
        now = self._now()
        leaf = authorities.signer(now).leaf(self._hosts, now)
        _use(self.context, leaf)
        self._renew_at = leaf.renew_at
        return True

    async def keep_young(self, check_seconds: float = CHECK_SECONDS) -> None:
        """Renew whenever it is due, for ever."""
        while True:
            await asyncio.sleep(check_seconds)
            try:
                if await self.renew_if_due():
                    _log.info("Renewed the certificate of the progress endpoint.")
            except (ApiError, SetupProblem) as error:
                _log.error("The certificate of the progress endpoint could not be renewed; next try soon: %s", error)


@asynccontextmanager
async def progress_endpoint(
    app: web.Application, certificate: ServerCertificate, host: str, port: int
) -> AsyncIterator[int]:
    """Serve `app` over HTTPS for as long as the context is open.

    Yields:
        The port.

    Raises:
        SetupProblem, ApiError: as CertificateAuthority.load.
        OSError: as `listening`.
    """
    await certificate.renew_if_due()
    async with listening(app, host, port, tls=certificate.context) as actual_port:
        renewal = asyncio.create_task(certificate.keep_young())
        try:
            yield actual_port
        finally:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)


def _use(context: ssl.SSLContext, leaf: Leaf) -> None:
    with _as_file(leaf.certificate) as certificate, _as_file(leaf.key) as key:
        context.load_cert_chain(certificate, key)


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path to read `content` from once. ssl reads files only, and a private key has no place on a disk."""
    reading, writing = os.pipe()
    try:
        try:
            os.write(writing, content)  # far below what a pipe takes without a reader
        finally:
            os.close(writing)
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)
