"""The port of the fault proxy: it can be closed, and it can be open while nobody is behind it."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from aiohttp import web

from tests.cluster.control_plane import HOST
from tests.processes import unused_port


class Listener:
    """One port. All methods belong to the event loop of the proxy."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._port = unused_port()
        self.url = f"https://{HOST}:{self._port}"
        self._dead: set[Any] = set()
        """Transports of connections over which nothing comes any more."""
        self._deaf: set[asyncio.StreamWriter] = set()
        """Connections that were accepted by nobody."""

    async def serve(self, server: web.Server) -> None:
        """Listen for connections to `server`."""
        self._web = server
        await self.open()

    async def open(self) -> None:
        """Listen again."""
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(self._web, HOST, self._port, ssl=self._tls, reuse_address=True)

    async def cut(self) -> None:
        """Accept nothing, and end the connections that exist."""
        await self._close()
        for connection in self._web.connections:
            if connection.transport is not None:
                connection.transport.abort()
        for writer in self._deaf:
            writer.transport.abort()
        self._deaf.clear()
        self._dead.clear()

    async def die(self) -> None:
        """Accept connections without a word; those that exist are silent from now on, and stay so."""
        self._dead.update(c.transport for c in self._web.connections if c.transport is not None)
        await self._close()

        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._deaf.add(writer)

        self._listening = await asyncio.start_server(accept, HOST, self._port, reuse_address=True)

    async def revive(self) -> None:
        """Serve new connections again. Nobody tells the others."""
        await self._close()
        await self.open()

    async def alive(self, request: web.Request) -> None:
        """Return if anything can come over the connection of a request, and never otherwise."""
        if request.transport in self._dead:
            await asyncio.Event().wait()

    async def _close(self) -> None:
        # asyncio forgets to close a connection that it accepted just before its server was closed.
        loop = asyncio.get_running_loop()
        for listener in self._listening.sockets:
            loop.remove_reader(listener.fileno())
        await asyncio.sleep(0.01)
        self._listening.close()
