"""A port serves, has room for so many at a time, and neither waits for the slow nor outlives its context."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from aiohttp import ClientSession, web

from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.endpoint import ServerCertificate
from finetune_operator.serving import connections
from finetune_operator.serving import port as port_module
from finetune_operator.serving.answers import counted
from finetune_operator.serving.port import listening
from finetune_operator.serving.thread import listening_in_thread
from tests.operator.progress.fake_cluster import FakeCluster

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def app() -> web.Application:
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
    now = lambda: datetime.now(UTC)  # noqa: E731
    authority = CertificateAuthority(FakeCluster(), namespace="n", secret="s", config_map="c", now=now)
    certificate = ServerCertificate(authority, ["127.0.0.1"], now=now)
    await certificate.renew_if_due()
    return certificate.context


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


def run(use: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await use()

    asyncio.run(bounded())


def test_of_a_port_on_all_addresses_every_loopback_address_answers() -> None:
    async def use() -> None:
        addresses = ["127.0.0.1"]
        if socket.has_dualstack_ipv6():
            addresses.append("[::1]")
        async with listening(app(), "", 0) as port, ClientSession() as session:
            for address in addresses:
                async with session.get(f"http://{address}:{port}/") as answer:
                    assert await answer.text() == "hello"

    run(use)


def test_a_port_that_is_taken_is_an_error() -> None:
    async def use() -> None:
        async with listening(app(), "127.0.0.1", 0) as port:
            with pytest.raises(OSError, match="in use"):
                async with listening(app(), "127.0.0.1", port):
                    pass

    run(use)


def test_a_port_that_is_taken_is_an_error_without_a_loop_too() -> None:
    with (
        listening_in_thread(app(), "127.0.0.1", 0) as port,
        pytest.raises(OSError, match="in use"),
        listening_in_thread(app(), "127.0.0.1", port),
    ):
        pass


def test_connections_over_the_limit_wait_for_their_turn() -> None:
    async def use() -> None:
        async with (
            listening(app(), "127.0.0.1", 0, connections_limit=2) as port,
            connection(port),
            connection(port) as (_, second),
            connection(port) as (reader, writer),
        ):
            writer.write(REQUEST)
            waiting = asyncio.create_task(reader.read())
            # A connection that was accepted is answered within a few turns of the event loop.
            for _ in range(100):
                await asyncio.sleep(0)
            assert not waiting.done()
            second.close()
            assert (await waiting).endswith(b"hello")

    run(use)


def test_room_is_given_back_by_connections_that_end_or_fail() -> None:
    async def use() -> None:
        async with listening(app(), "127.0.0.1", 0, tls=await tls_context(), connections_limit=1) as port:
            for _ in range(3):
                async with connection(port) as (reader, writer):
                    writer.write(REQUEST)
                    assert b"hello" not in await reader.read()
            async with ClientSession() as session:
                for _ in range(3):
                    url = f"https://127.0.0.1:{port}/"
                    async with session.get(url, ssl=False, headers={"Connection": "close"}) as answer:
                        assert await answer.text() == "hello"

    run(use)


def test_a_handshake_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_SECONDS", 0.05)

    async def use() -> None:
        async with (
            listening(app(), "127.0.0.1", 0, tls=await tls_context()) as port,
            connection(port) as (reader, _),
        ):
            assert await reader.read() == b""

    run(use)


@pytest.mark.parametrize("sent", [b"", REQUEST[:20]])
def test_a_connection_without_a_whole_request_is_closed(sent: bytes) -> None:
    async def use() -> None:
        async with (
            listening(app(), "127.0.0.1", 0, idle_timeout_seconds=0.05) as port,
            connection(port) as (reader, writer),
        ):
            writer.write(sent)
            assert await reader.read() == b""

    run(use)


@pytest.mark.parametrize("with_tls", [False, True])
def test_a_port_closes_although_clients_hold_on(with_tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(connections, "HANDSHAKE_SECONDS", 3600)

    async def use() -> None:
        tls = await tls_context() if with_tls else None
        async with listening(app(), "127.0.0.1", 0, tls=tls, idle_timeout_seconds=3600) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST[:10] if not with_tls else b"")
            await asyncio.sleep(0)
        assert await reader.read() == b""
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)

    run(use)


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("clients_stay", [False, True])
def test_whoever_connects_just_before_a_port_closes_leaves_no_open_socket(
    with_tls: bool, turns: int, clients_stay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_module, "LEAVE_SECONDS", 0.05)

    async def use() -> None:
        tls = await tls_context() if with_tls else None
        async with listening(app(), "127.0.0.1", 0, tls=tls) as port:
            await asyncio.sleep(0.01)  # until it waits for clients
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
            if not clients_stay:
                for client in clients:
                    client.close()
            for _ in range(turns):
                await asyncio.sleep(0)
        for client in clients:
            client.close()

    with warnings.catch_warnings(record=True) as unclosed:
        warnings.simplefilter("always")
        run(use)
        gc.collect()
    assert [str(warning.message) for warning in unclosed] == []


def test_a_process_out_of_file_descriptors_accepts_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "ACCEPT_PAUSE_SECONDS", 0)

    async def use() -> None:
        accept, failures = socket.socket.accept, [OSError(24, "Too many open files")]

        def sometimes(listener: socket.socket) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return accept(listener)

        monkeypatch.setattr(socket.socket, "accept", sometimes)
        async with listening(app(), "127.0.0.1", 0, connections_limit=1) as port, connection(port) as (reader, writer):
            writer.write(REQUEST)
            assert (await reader.read()).endswith(b"hello")

    run(use)


def test_every_answer_is_counted() -> None:
    statuses: list[int] = []

    async def use() -> None:
        async with listening(counted(app(), statuses.append), "127.0.0.1", 0) as port, ClientSession() as session:
            for path in ("/", "/forbidden", "/missing", "/bug"):
                async with session.get(f"http://127.0.0.1:{port}{path}"):
                    pass

    run(use)
    assert statuses == [200, 403, 404, 500]
