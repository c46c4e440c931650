"""Opens a port for callers that have no event loop, such as `finetune run` while a trainer runs."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from aiohttp import web

from finetune_operator.serving.port import listening


@contextmanager
def listening_in_thread(
    app: web.Application, host: str, port: int, *, tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """`listening`, on a thread of its own for as long as the context is open.

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
