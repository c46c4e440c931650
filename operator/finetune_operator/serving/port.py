"""Opens a port: one way to listen, with and without TLS, whatever is served."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager

from aiohttp import web

from finetune_operator.serving.admission import Admission, Limits, Place
from finetune_operator.serving.answers import one_each
from finetune_operator.serving.connections import accept_connections, end_tasks
from finetune_operator.serving.server_log import ServerLog

BACKLOG = 4096
"""Connections of one port that wait for their turn."""
LEAVE_SECONDS = 1.0
"""How long open connections may take to end when the port is closed."""
LINGER_SECONDS = 1.0
"""How long the rest of a body is read that was answered before its end, so that the client sees the answer."""
LINE_BYTES = 2048
HEADERS = 64
"""Most that the first line of a request may have, and headers that may follow; a trainer's has eight."""
TLS_LIMITS = Limits()
PLAIN_LIMITS = Limits(all_fruitless_burst=1000, all_fruitless_per_second=500.0)
"""Without TLS a request takes a fifth of the time, and a probe must not wait behind strangers for long."""

_log = logging.getLogger(__name__)


@asynccontextmanager
async def listening(
    app: web.Application,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
    fruitful: Container[int] = (),
) -> AsyncIterator[int]:
    """Serve `app` for as long as the context is open.

    Args:
        app: what to serve, once: it is changed so that each connection ends with its first answer.
        host: address to listen on; empty for all, of IPv4 and IPv6.
        port: 0 for any free one.
        tls: certificates to serve HTTPS with; None for HTTP.
        limits: what clients may take; TLS_LIMITS or PLAIN_LIMITS by default.
        fruitful: statuses of answers whose connection does not count among those that lead to nothing.

    Yields:
        The port.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    limits = limits or (TLS_LIMITS if tls else PLAIN_LIMITS)
    admission = Admission(limits)

    def answered(peer: str, status: int) -> None:
        if status in fruitful:
            admission.fruitful(peer)

    with _listener(host, port) as listener:
        runner = web.AppRunner(
            one_each(app, answered),
            # A client that has gone must not leave work behind: its place is free for the next one.
            handler_cancellation=True,
            # aiohttp's word for it; it counts from the beginning of the connection, however slowly headers trickle.
            keepalive_timeout=limits.request_seconds,
            lingering_time=LINGER_SECONDS,
            auto_decompress=False,
            max_line_size=LINE_BYTES,
            max_headers=HEADERS,
            logger=ServerLog(_log),
            # Whoever stops the server need not wait for clients: they ask or tell again.
            shutdown_timeout=1.0,
            # A line per request would bury all others.
            access_log=None,
        )
        await runner.setup()
        http = runner.server
        if http is None:
            raise RuntimeError("aiohttp's runner has no server although it is set up")
        connections: dict[asyncio.Task[None], Place] = {}
        accepting = asyncio.create_task(accept_connections(listener, http, tls, limits, admission, connections))
        try:
            yield listener.getsockname()[1]
        finally:
            await end_tasks({accepting})
            await runner.cleanup()
            if connections:
                await asyncio.wait(list(connections), timeout=LEAVE_SECONDS)
            await end_tasks(connections)


def _listener(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        listener = socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener
