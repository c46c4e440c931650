"""A port serves, has room for so many at a time and of one address, and neither waits for the slow nor outlives its
context."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime

import pytest
from aiohttp import ClientSession, web

from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.endpoint import ServerCertificate
from finetune_operator.serving import connections
from finetune_operator.serving import port as port_module
from finetune_operator.serving.admission import Limits
from finetune_operator.serving.answers import counted
from finetune_operator.serving.port import listening
from finetune_operator.serving.thread import listening_in_thread
from tests.operator.progress.fake_cluster import FakeCluster

HERE, THERE = "127.0.0.1", "127.0.0.2"
"""Two addresses of this machine, as two pods have two."""
ONE_AT_A_TIME = Limits(connections=1, grace_seconds=3600)
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
    async with connection(port, source) as (reader, writer):
        writer.write(REQUEST)
        return await read_all(reader)


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
            listening(app(), "127.0.0.1", 0, limits=Limits(connections=2, grace_seconds=3600)) as port,
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
        async with listening(app(), "127.0.0.1", 0, tls=await tls_context(), limits=ONE_AT_A_TIME) as port:
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


def test_a_handshake_that_takes_for_ever_is_given_up() -> None:
    async def use() -> None:
        async with (
            listening(app(), "127.0.0.1", 0, tls=await tls_context(), limits=Limits(handshake_seconds=0.05)) as port,
            connection(port) as (reader, _),
        ):
            assert await reader.read() == b""

    run(use)


@pytest.mark.parametrize("sent", [b"", REQUEST[:20]])
def test_a_connection_without_a_whole_request_is_closed(sent: bytes) -> None:
    async def use() -> None:
        async with (
            listening(app(), "127.0.0.1", 0, limits=Limits(request_seconds=0.05)) as port,
            connection(port) as (reader, writer),
        ):
            writer.write(sent)
            assert await reader.read() == b""

    run(use)


def test_a_request_that_trickles_in_is_given_up_although_something_always_comes() -> None:
    async def use() -> None:
        async with (
            listening(app(), "127.0.0.1", 0, limits=Limits(request_seconds=0.1)) as port,
            connection(port) as (reader, writer),
        ):
            ended = asyncio.create_task(read_all(reader))
            writer.write(REQUEST[:-2] + b"X-Slow: ")
            while not ended.done():
                writer.write(b"x")
                await asyncio.sleep(0.001)
            assert await ended == b""

    run(use)


def test_a_client_that_does_not_take_its_answer_is_cut_off() -> None:
    async def large(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * 64_000_000)

    application = web.Application()
    application.router.add_get("/", large)

    async def use() -> None:
        limits = Limits(connections=1, grace_seconds=3600, life_seconds=0.1)
        async with listening(application, "127.0.0.1", 0, limits=limits) as port, connection(port) as (_, writer):
            writer.write(REQUEST)
            # There is one place, so this one is served when the first has lost it.
            async with connection(port) as (reader, second):
                second.write(REQUEST)
                assert (await reader.read(12)).endswith(b"200")

    run(use)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 10_000_000, id="headers"),
        pytest.param(b"GET /" + b"x" * 60_000_000, id="line"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 60_000_000, id="header"),
        pytest.param(REQUEST.replace(b"close", b"keep-alive") * 1_000_000, id="requests"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + b"2\r\nxx\r\n" * 8_000_000,
            id="body",
        ),
    ],
)
def test_whoever_sends_without_end_is_cut_off(sent: bytes) -> None:
    async def use() -> None:
        limits = Limits(life_seconds=3600, request_seconds=3600)
        async with listening(app(), "127.0.0.1", 0, limits=limits) as port, connection(port) as (reader, writer):
            answer = asyncio.create_task(read_all(reader))
            assert await taken(writer, sent) < len(sent)
            await answer

    run(use)


def test_whoever_sends_on_while_the_answer_is_awaited_is_cut_off() -> None:
    async def busy(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    application = web.Application()
    application.router.add_get("/", busy)
    request = REQUEST.replace(b"close", b"keep-alive")
    large = request[:-2] + (b"X-Large: " + b"x" * 8000 + b"\r\n") * 60 + b"\r\n"

    async def use() -> None:
        limits = Limits(life_seconds=3600, request_seconds=3600)
        async with listening(application, "127.0.0.1", 0, limits=limits) as port, connection(port) as (_, writer):
            assert await taken(writer, request + large * 100) < 100 * len(large)

    run(use)


def test_a_connection_carries_one_request() -> None:
    async def use() -> None:
        async with listening(app(), "127.0.0.1", 0) as port, connection(port) as (reader, writer):
            writer.write(REQUEST.replace(b"close", b"keep-alive") * 2)
            received = await read_all(reader)
            assert received.count(b"HTTP/1.1 200") == 1
            assert received.endswith(b"hello")

    run(use)


@pytest.mark.parametrize("with_tls", [False, True])
def test_one_address_cannot_take_the_places_of_others(with_tls: bool) -> None:
    async def use() -> None:
        tls = await tls_context() if with_tls else None
        async with listening(app(), "127.0.0.1", 0, tls=tls) as port, AsyncExitStack() as silent:
            for _ in range(300):
                await silent.enter_async_context(connection(port, THERE))
            url = f"{'https' if with_tls else 'http'}://127.0.0.1:{port}/"
            async with ClientSession() as session, session.get(url, ssl=False) as answer:
                assert await answer.text() == "hello"

    run(use)


def test_whoever_has_more_than_an_address_may_have_is_sent_away_at_once() -> None:
    async def use() -> None:
        limits = Limits(connections_of_one=2, request_seconds=3600)
        async with (
            listening(app(), "127.0.0.1", 0, limits=limits) as port,
            connection(port) as (first, writer),
            connection(port),
            connection(port) as (third, _),
        ):
            assert await read_all(third) == b""
            writer.write(REQUEST)
            assert (await read_all(first)).endswith(b"hello")
            assert (await ask(port)).endswith(b"hello")

    run(use)


def test_a_full_port_lets_newcomers_in_and_whoever_has_most_loses_a_connection() -> None:
    async def use() -> None:
        limits = Limits(connections=3, grace_seconds=0, request_seconds=3600)
        async with (
            listening(app(), "127.0.0.1", 0, limits=limits) as port,
            connection(port, THERE) as (oldest, _),
            connection(port, THERE),
            connection(port, "127.0.0.3") as (alone, writer),
        ):
            assert (await ask(port)).endswith(b"hello")
            assert await read_all(oldest) == b""
            writer.write(REQUEST)
            assert (await read_all(alone)).endswith(b"hello")

    run(use)


def test_connections_that_lead_to_nothing_run_out_and_those_of_others_do_not() -> None:
    async def use() -> None:
        limits = Limits(fruitless_burst=5, fruitless_per_second=1e-9)
        async with listening(app(), "127.0.0.1", 0, limits=limits) as port:
            answers = [await ask(port, THERE) for _ in range(7)]
            assert [answer.endswith(b"hello") for answer in answers] == [True] * 5 + [False] * 2
            assert (await ask(port, HERE)).endswith(b"hello")

    run(use)


def test_connections_whose_answer_is_what_the_port_is_for_never_run_out() -> None:
    async def use() -> None:
        limits = Limits(fruitless_burst=5, fruitless_per_second=1e-9)
        async with listening(app(), "127.0.0.1", 0, limits=limits, fruitful={200}) as port:
            for _ in range(20):
                assert (await ask(port)).endswith(b"hello")

    run(use)


def test_what_is_refused_is_told_once_with_the_address(caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> None:
        limits = Limits(fruitless_burst=1, fruitless_per_second=1e-9)
        async with listening(app(), "127.0.0.1", 0, limits=limits) as port:
            for _ in range(20):
                await ask(port, THERE)

    run(use)
    (line,) = [record.getMessage() for record in caplog.records]
    assert THERE in line
    assert "was refused" in line


MALFORMED = [
    b"\x00\x01\x02\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nA: b\rfake line\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nExpect: magic\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /%0a%0dfake HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: \xff\xfe=\xff\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("sent", MALFORMED)
def test_what_is_no_request_is_answered_or_cut_off_and_leaves_no_line_in_the_log(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def use() -> None:
        limits = Limits(request_seconds=0.2)
        async with listening(app(), "127.0.0.1", 0, limits=limits) as port:
            async with connection(port) as (reader, writer):
                writer.write(sent)
                received = await read_all(reader)
                assert received == b"" or received.startswith(b"HTTP/")
            assert (await ask(port)).endswith(b"hello")

    run(use)
    assert [record.getMessage() for record in caplog.records] == []


def test_a_bug_in_what_is_served_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> None:
        async with listening(app(), "127.0.0.1", 0) as port, connection(port) as (reader, writer):
            writer.write(REQUEST.replace(b"GET /", b"GET /bug"))
            assert b" 500 " in await read_all(reader)

    run(use)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ValueError


def test_what_is_done_for_a_client_ends_when_it_goes_away() -> None:
    async def use() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def slow(_: web.Request) -> web.Response:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return web.Response()

        application = web.Application()
        application.router.add_get("/", slow)
        async with listening(application, "127.0.0.1", 0) as port:
            async with connection(port) as (_, writer):
                writer.write(REQUEST)
                await begun.wait()
            await ended.wait()

    run(use)


@pytest.mark.parametrize("with_tls", [False, True])
def test_a_port_closes_although_clients_hold_on(with_tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "LEAVE_SECONDS", 0.05)

    async def use() -> None:
        tls = await tls_context() if with_tls else None
        patient = Limits(handshake_seconds=3600, request_seconds=3600, life_seconds=3600)
        async with listening(app(), "127.0.0.1", 0, tls=tls, limits=patient) as port:
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
        async with listening(app(), "127.0.0.1", 0, limits=ONE_AT_A_TIME) as port, connection(port) as (reader, writer):
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
