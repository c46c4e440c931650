"""Accepts connections, and ends each in time: the silent, the slow, those that send without end.

aiohttp's own sites accept every connection and leave it alone, and one with TLS takes a quarter of a megabyte.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import cast

from finetune_operator.serving.admission import Admission, Limits, Place
from finetune_operator.serving.complaint import Complaint

BATCH = 16
"""Connections that are accepted in a row; then everything else gets its turn."""
REFUSED_PAUSE_SECONDS = 0.005
"""Pause after a batch in which a connection was refused (seconds): refusing takes a twentieth of the loop at most."""
ACCEPT_PAUSE_SECONDS = 1.0
"""Wait after a connection could not be accepted, which happens when the process has no file descriptor left."""

Protocols = Callable[[], asyncio.Protocol]
"""Makes what speaks HTTP over one connection."""

_log = logging.getLogger(__name__)


async def accept_connections(
    listener: socket.socket,
    http: Protocols,
    tls: ssl.SSLContext | None,
    limits: Limits,
    admission: Admission,
    connections: dict[asyncio.Task[None], Place],
) -> None:
    """Accept until cancelled.

    Args:
        listener: where connections arrive.
        http: see Protocols.
        tls: certificates to serve HTTPS with; None for HTTP.
        limits: what a connection may take.
        admission: who gets one.
        connections: those which are open, by the task that serves each.
    """

    def ended(task: asyncio.Task[None]) -> None:
        admission.leave(connections.pop(task))

    port = listener.getsockname()[1]
    refused = Complaint(
        _log, f"A connection to port {port} from %s was refused: it has too many, or too many that lead to nothing"
    )
    failed = Complaint(_log, f"A connection to port {port} could not be accepted: %s")
    turn, was_refused = 0, False
    while True:
        turn += 1
        if turn % BATCH == 0:
            await asyncio.sleep(REFUSED_PAUSE_SECONDS if was_refused else 0)
            was_refused = False
        await admission.room()
        try:
            connection, peer = await _next_connection(listener)
        except OSError as error:
            failed(error)
            await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
            continue
        if not admission.admits(peer):
            connection.close()
            refused(peer)
            was_refused = True
            continue
        task = asyncio.create_task(_serve(connection, http, tls, limits))
        connections[task] = admission.enter(peer, task.cancel)
        task.add_done_callback(ended)


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel them, and return once they have ended."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


async def _next_connection(listener: socket.socket) -> tuple[socket.socket, str]:
    """Waits for one and accepts it in one go: `sock_accept` drops a connection if it is cancelled right after it.

    Returns:
        The connection, and the address that it comes from.
    """
    while True:
        try:
            connection, address = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # nobody is there, or has gone already
            await _readable(listener)
        else:
            connection.setblocking(False)
            return connection, address[0]


async def _readable(listener: socket.socket) -> None:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(listener)


async def _serve(connection: socket.socket, http: Protocols, tls: ssl.SSLContext | None, limits: Limits) -> None:
    """Serve one connection until it is closed or has lasted too long; it is cut when this is cancelled."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    seconds = None if tls is None else limits.handshake_seconds
    try:
        transport, _ = await loop.connect_accepted_socket(
            lambda: _Connection(http(), over, limits.received_bytes),
            connection,
            ssl=tls,
            ssl_handshake_timeout=seconds,
            ssl_shutdown_timeout=seconds,
        )
    except OSError:  # a client that speaks no TLS, does not trust us, is too slow or has gone
        return
    try:
        async with asyncio.timeout(limits.life_seconds):
            await over.wait()
    except TimeoutError:
        return
    finally:
        transport.abort()
        await over.wait()


class _Connection(asyncio.Protocol):
    """Hands on to aiohttp's protocol what may come in, and tells when the connection is over."""

    def __init__(self, http: asyncio.Protocol, over: asyncio.Event, received_bytes: int) -> None:
        self._http = http
        self._over = over
        self._room = received_bytes
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._http.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        # What was read at once is handed on whole: the answer to a body that is too large is a sentence.
        if self._room <= 0 and self._transport is not None:
            self._transport.abort()
            return
        self._room -= len(data)
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
