"""A port has room for so many at a time and of one address, and does not wait for the slow."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from aiohttp import ClientSession, web

from finetune_operator.serving.admission import Limits
from finetune_operator.serving.port import listening
from tests.operator.serving.clients import (
    HERE,
    ONE_AT_A_TIME,
    REQUEST,
    THERE,
    app,
    ask,
    connection,
    read_all,
    run,
    taken,
    tls_context,
)


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
