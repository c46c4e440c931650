"""Accepts connections one by one: so many are open at a time, and the others wait in the kernel.

aiohttp's own sites accept every connection, and one with TLS takes a quarter of a megabyte.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterable

HANDSHAKE_SECONDS = 5.0
"""How long a client may take to agree on a TLS connection, and to take leave of it."""
ACCEPT_PAUSE_SECONDS = 1.0
"""Wait after a connection could not be accepted, which happens when the process has no file descriptor left."""

_log = logging.getLogger(__name__)


async def accept_connections(
    listener: socket.socket,
    http: Callable[[], asyncio.Protocol],
    tls: ssl.SSLContext | None,
    free: asyncio.Semaphore,
    connections: set[asyncio.Task[None]],
) -> None:
    """Accept until cancelled.

    Args:
        listener: where connections arrive.
        http: makes the protocol that serves one.
        tls: certificates to serve HTTPS with; None for HTTP.
        free: places for connections.
        connections: the tasks that serve those which are open.
    """

    def ended(task: asyncio.Task[None]) -> None:
        connections.discard(task)
        free.release()

    while True:
        await free.acquire()
        try:
            connection = await _next_connection(listener)
        except OSError as error:
            free.release()
            _log.error("A connection could not be accepted: %s.", error)
            await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
            continue
        task = asyncio.create_task(_serve(connection, http, tls))
        connections.add(task)
        task.add_done_callback(ended)


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel them, and return once they have ended."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


async def _next_connection(listener: socket.socket) -> socket.socket:
    """Waits for one and accepts it in one go: `sock_accept` drops a connection if it is cancelled right after it."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, readable.set)
    try:
        while True:
            await readable.wait()
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # whoever was there has gone
                readable.clear()
            else:
                connection.setblocking(False)
                return connection
    finally:
        loop.remove_reader(listener)


async def _serve(connection: socket.socket, http: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None) -> None:
    """Serve one connection until it is closed; it is cut when this is cancelled."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    seconds = None if tls is None else HANDSHAKE_SECONDS
    try:
        transport, _ = await loop.connect_accepted_socket(
            lambda: _Connection(http(), over),
            connection,
            ssl=tls,
            ssl_handshake_timeout=seconds,
            ssl_shutdown_timeout=seconds,
        )
    except OSError:  # a client that speaks no TLS, does not trust us, is too slow or has gone
        return
    try:
        await over.wait()
    finally:
        transport.abort()
        await over.wait()


class _Connection(asyncio.Protocol):
    """Hands everything on to aiohttp's protocol, and tells when the connection is over."""

    def __init__(self, http: asyncio.Protocol, over: asyncio.Event) -> None:
        self._http = http
        self._over = over

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._http.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._http.data_received(data)

    def eof_received(self) -> bool | None:
        return self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self._http.connection_lost(exc)
        finally:
            self._over.set()
