"""Opens the operator's ports: one way to listen, with and without TLS, whatever is served.

aiohttp's own sites accept every connection, and one with TLS takes a quarter of a megabyte. Here a port has so many at
a time and the others wait in the kernel, so that nobody in the cluster can make the operator run out of memory.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web
from aiohttp.typedefs import Handler

from finetune_operator.progress_server import progress_runner

CONNECTIONS_LIMIT = 128
"""Connections of one port that are open at the same time. A trainer's lasts some milliseconds per report."""
BACKLOG = 1024
"""Connections of one port that wait for their turn."""
HANDSHAKE_SECONDS = 5.0
"""How long a client may take to agree on a TLS connection, and to take leave of it."""
LEAVE_SECONDS = 1.0
"""How long open connections may take to end when the port is closed."""
ACCEPT_PAUSE_SECONDS = 1.0
"""Wait after a connection could not be accepted, which happens when the process has no file descriptor left."""

_log = logging.getLogger(__name__)


@asynccontextmanager
async def listening(
    app: web.Application,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    connections_limit: int = CONNECTIONS_LIMIT,
    **timeouts: float,
) -> AsyncIterator[int]:
    """Serve `app` for as long as the context is open.

    Args:
        app: what to serve.
        host: address to listen on; empty for all, of IPv4 and IPv6.
        port: 0 for any free one.
        tls: certificates to serve HTTPS with; None for HTTP.
        connections_limit: see CONNECTIONS_LIMIT.
        timeouts: those of `progress_runner`.

    Yields:
        The port.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    with _listener(host, port) as listener:
        runner = progress_runner(app, **timeouts)
        await runner.setup()
        http = runner.server
        if http is None:
            raise RuntimeError("aiohttp's runner has no server although it is set up")
        connections: set[asyncio.Task[None]] = set()
        accepting = asyncio.create_task(_accept(listener, http, tls, asyncio.Semaphore(connections_limit), connections))
        try:
            yield listener.getsockname()[1]
        finally:
            await _end({accepting})
            await runner.cleanup()
            if connections:
                await asyncio.wait(connections, timeout=LEAVE_SECONDS)
            await _end(connections)


@contextmanager
def listening_in_thread(
    app: web.Application, host: str, port: int, *, tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """`listening`, for callers that have no event loop: the server runs on a thread of its own.

    Yields:
        The port.

    Raises:
        OSError: as `listening`.
    """
    begun: Future[tuple[asyncio.AbstractEventLoop, int]] = Future()
    stop = asyncio.Event()

    async def serve() -> None:
        async with listening(app, host, port, tls=tls) as opened:
            begun.set_result((asyncio.get_running_loop(), opened))
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:
            if begun.done():
                raise
            begun.set_exception(error)  # the caller waits for it

    thread = threading.Thread(target=run, name="http-server", daemon=True)
    thread.start()
    loop, opened = begun.result()
    try:
        yield opened
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def counted(app: web.Application, count: Callable[[int], None]) -> web.Application:
    """`app`, which from now on tells `count` the HTTP status of every answer."""

    @web.middleware
    async def count_answers(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPException as answer:
            count(answer.status)
            raise
        except Exception:  # aiohttp answers so
            count(500)
            raise
        count(response.status)
        return response

    app.middlewares.append(count_answers)
    return app


def _listener(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        listener = socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener


async def _accept(
    listener: socket.socket,
    http: Callable[[], asyncio.Protocol],
    tls: ssl.SSLContext | None,
    free: asyncio.Semaphore,
    connections: set[asyncio.Task[None]],
) -> None:
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


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


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
