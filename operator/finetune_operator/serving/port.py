"""Opens a port: one way to listen, with and without TLS, whatever is served."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from finetune_operator.serving.connections import accept_connections, end_tasks

CONNECTIONS_LIMIT = 128
"""Connections of one port that are open at the same time. A trainer's lasts some milliseconds per report."""
IDLE_TIMEOUT_SECONDS = 30.0
"""How long a connection may be open without a whole request, the first one's headers included."""
BACKLOG = 1024
"""Connections of one port that wait for their turn."""
LEAVE_SECONDS = 1.0
"""How long open connections may take to end when the port is closed."""


@asynccontextmanager
async def listening(
    app: web.Application,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    connections_limit: int = CONNECTIONS_LIMIT,
    idle_timeout_seconds: float = IDLE_TIMEOUT_SECONDS,
) -> AsyncIterator[int]:
    """Serve `app` for as long as the context is open.

    Args:
        app: what to serve.
        host: address to listen on; empty for all, of IPv4 and IPv6.
        port: 0 for any free one.
        tls: certificates to serve HTTPS with; None for HTTP.
        connections_limit: see CONNECTIONS_LIMIT.
        idle_timeout_seconds: see IDLE_TIMEOUT_SECONDS.

    Yields:
        The port.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    with _listener(host, port) as listener:
        runner = web.AppRunner(
            app,
            keepalive_timeout=idle_timeout_seconds,
            # Whoever stops the server need not wait for clients: they ask or tell again.
            shutdown_timeout=1.0,
            # A line per request would bury all others.
            access_log=None,
        )
        await runner.setup()
        http = runner.server
        if http is None:
            raise RuntimeError("aiohttp's runner has no server although it is set up")
        connections: set[asyncio.Task[None]] = set()
        places = asyncio.Semaphore(connections_limit)
        accepting = asyncio.create_task(accept_connections(listener, http, tls, places, connections))
        try:
            yield listener.getsockname()[1]
        finally:
            await end_tasks({accepting})
            await runner.cleanup()
            if connections:
                await asyncio.wait(connections, timeout=LEAVE_SECONDS)
            await end_tasks(connections)


def _listener(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        listener = socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener
