"""A port serves wherever it should, and neither outlives its context nor leaves anything behind."""

from __future__ import annotations

import asyncio
import gc
import socket
import warnings

import pytest
from aiohttp import ClientSession, web

from finetune_operator.serving import connections
from finetune_operator.serving import port as port_module
from finetune_operator.serving.admission import Limits
from finetune_operator.serving.answers import counted
from finetune_operator.serving.port import listening
from finetune_operator.serving.thread import listening_in_thread
from tests.operator.serving.clients import (
    ONE_AT_A_TIME,
    REQUEST,
    app,
    connection,
    run,
    tls_context,
)


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
