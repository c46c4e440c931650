"""A small server, and clients of it from two addresses, who may be slow, rude or many."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

from aiohttp import web

from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.endpoint import ServerCertificate
from finetune_operator.serving.admission import Limits
from tests.operator.progress.fake_cluster import FakeCluster

HERE, THERE = "127.0.0.1", "127.0.0.2"
"""Two addresses of this machine, as two pods have two."""
ONE_AT_A_TIME = Limits(connections=1, grace_seconds=3600)
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def app() -> web.Application:
    """Answers "hello", refuses, or has a bug."""

    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def fail(_: web.Request) -> web.Response:
        raise web.HTTPForbidden

    async def bug(_: web.Request) -> web.Response:
        raise ValueError

    application = web.Application()
    application.router.add_get("/", hello)
    application.router.add_get("/forbidden", fail)
    application.router.add_get("/bug", bug)
    return application


async def tls_context() -> ssl.SSLContext:
    """That of the progress endpoint, for this machine."""

    now = lambda: datetime.now(UTC)  # noqa: E731
    authority = CertificateAuthority(FakeCluster(), namespace="n", secret="s", config_map="c", now=now)
    certificate = ServerCertificate(authority, ["127.0.0.1"], now=now)
    await certificate.renew_if_due()
    return certificate.context


@asynccontextmanager
async def connection(port: int, source: str = HERE) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends, however it ends."""
    received = b""
    with suppress(ConnectionError):
        while chunk := await reader.read(65536):
            received += chunk
    return received


async def taken(writer: asyncio.StreamWriter, data: bytes) -> int:
    """How much of `data` could be sent before the connection ended (bytes)."""
    sent = 0
    with suppress(ConnectionError):
        for sent in range(0, len(data) + 1, 65536):
            writer.write(data[sent : sent + 65536])
            await writer.drain()
    return sent


async def ask(port: int, source: str = HERE) -> bytes:
    """What a whole request is answered."""

    async with connection(port, source) as (reader, writer):
        writer.write(REQUEST)
        return await read_all(reader)


def run(use: Callable[[], Awaitable[None]]) -> None:
    """Run a test that must end within a minute."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await use()

    asyncio.run(bounded())
