"""Stands between an operator and the API server, and does to their conversation what networks and servers do to it.

Requests are refused, answers lost, garbled or held back after the server has carried them out, events swallowed or
late, watches silent or ended by an error, connections dead, and the server out of reach. What is to go wrong is a
test's to say, in the words of `faults`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import aiohttp
from aiohttp import web

from tests.cluster.api import Object
from tests.cluster.control_plane import HOST, ControlPlane
from tests.faults.calls import Call, read_call
from tests.faults.faults import SWALLOW, AfterAnswer, Fate, Garbled, OnEvent, Refusal, Refuse
from tests.faults.listener import Listener

WATCH_TYPES = ("ADDED", "MODIFIED", "DELETED")
_NOT_PASSED_ON = {"host", "connection", "transfer-encoding", "content-length", "accept-encoding", "keep-alive"}
T = TypeVar("T")


class FaultProxy:
    """A proxy to one API server, in a thread of its own; `run_fault_proxy` makes one."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.refuse: Refuse | None = None
        self.after_answer: AfterAnswer | None = None
        self.on_event: OnEvent | None = None
        self.done: list[tuple[Call, int]] = []
        """Every changing request that the server answered, and its code."""
        self._server = plane.url
        certificate, key = folder / "proxy.crt", folder / "proxy.key"
        plane.issue_certificate(HOST).write(certificate, key)
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate, key)
        self._listener = Listener(tls)
        self.url = self._listener.url
        self._trust = ssl.create_default_context(cafile=str(plane.ca_file))
        self._silent: set[str] = set()
        self._unanswered: set[str] = set()
        self.waiting_watches = 0
        """Requests for watches that wait for an answer, which they never get."""
        self._watches: dict[asyncio.Task[Any], tuple[str, web.StreamResponse]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        self._await(self._start())

    def stop(self) -> None:
        """End everything."""
        self._await(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def calm(self) -> None:
        """Nothing goes wrong from now on, and nothing has been done yet."""
        self.done.clear()
        self.refuse = self.after_answer = self.on_event = None
        self._silent.clear()
        self._unanswered.clear()

    @contextmanager
    def out_of_reach(self) -> Iterator[None]:
        """Connections are refused while this lasts, and those that exist are cut."""
        self._await(self._listener.cut())
        try:
            yield
        finally:
            self._await(self._listener.open())

    @contextmanager
    def half_open(self) -> Iterator[None]:
        """New connections are accepted while this lasts, and nothing comes over them; those that exist are dead from
        now on, and nobody says so."""
        self._await(self._listener.die())
        try:
            yield
        finally:
            self._await(self._listener.revive())

    def silent(self, *resources: str) -> AbstractContextManager[None]:
        """Watches of these plurals stay connected and say nothing; what they would have said is lost."""
        return _within(self._silent, resources)

    def unanswered(self, *resources: str) -> AbstractContextManager[None]:
        """Requests for watches of these plurals get no answer at all, not even a status line."""
        return _within(self._unanswered, resources)

    def end_watches(self, last_words: bytes, *resources: str) -> int:
        """Say that into the watches of these plurals and end them; how many there were."""
        return self._await(self._end_watches(last_words, resources))

    def watched(self) -> list[str]:
        """Plurals of the watches that are open."""
        return sorted(resource for resource, _ in list(self._watches.values()))

    def changes(self, job: str) -> list[tuple[str, str, str, int]]:
        """Verb, resource, name and code of the changing requests about a job, in the order of their answers."""
        return [(call.verb, call.resource, call.name, code) for call, code in list(self.done) if call.job == job]

    def created(self, job: str, resource: str) -> list[str]:
        """Names of what was created for a job, in that order."""
        return [name for verb, what, name, code in self.changes(job) if (verb, what, code) == ("create", resource, 201)]

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _start(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self._trust, limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=2**24,
            auto_decompress=False,
        )
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # A request whose sender is gone waits for nothing any more.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        assert self._runner.server is not None
        await self._listener.serve(self._runner.server)

    async def _stop(self) -> None:
        await self._listener.cut()
        await self._runner.cleanup()
        await self._session.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        # A connection is gone only some turns of the loop after it was closed.
        await asyncio.sleep(0.1)

    async def _end_watches(self, last_words: bytes, resources: tuple[str, ...]) -> int:
        chosen = [(task, answer) for task, (what, answer) in self._watches.items() if what in resources]
        for task, answer in chosen:
            if last_words:
                await answer.write(last_words)
            await answer.write_eof()
            task.cancel()
        return len(chosen)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        await self._listener.alive(request)
        content = await request.read()
        call = read_call(request, content)
        refusal = self.refuse(call) if self.refuse else None
        if isinstance(refusal, Refusal):
            return _refused(refusal)
        if refusal is not None:
            return await _met(refusal, request)
        if call.verb == "watch" and call.resource in self._unanswered:
            self.waiting_watches += 1
            try:
                await _for_ever()
            finally:
                self.waiting_watches -= 1
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _NOT_PASSED_ON}
        url = self._server + request.raw_path
        try:
            async with self._session.request(request.method, url, headers=headers, data=content or None) as answer:
                if call.verb == "watch" and answer.status == 200:
                    return await self._pass_events(request, call.resource, answer)
                body = await answer.read()
        except aiohttp.ClientError:
            return _lost(request)
        if call.writes:
            self.done.append((call, answer.status))
        fate = self.after_answer(call, answer.status) if self.after_answer else None
        if isinstance(fate, Fate):
            return await _met(fate, request, body)
        if isinstance(fate, Garbled):
            body = fate.change(body)
        await self._listener.alive(request)
        kept = {key: value for key, value in answer.headers.items() if key.lower() not in _NOT_PASSED_ON}
        return web.Response(status=answer.status, body=body, headers=kept)

    async def _pass_events(
        self, request: web.Request, resource: str, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        passed = web.StreamResponse(headers={"Content-Type": "application/json"})
        await passed.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches[task] = (resource, passed)
        # Later events wait for one that is late, as they do on a connection.
        try:
            async for line in answer.content:
                fate = self._fate(resource, line)
                await self._listener.alive(request)
                if isinstance(fate, Garbled):
                    await passed.write(fate.change(line))
                elif fate != SWALLOW:
                    await asyncio.sleep(fate)
                    await passed.write(line)
            await passed.write_eof()
        except (aiohttp.ClientError, ConnectionError):
            return _lost(request)
        finally:
            del self._watches[task]
        return passed

    def _fate(self, resource: str, line: bytes) -> float | Garbled:
        if resource in self._silent:
            return SWALLOW
        event: Object = json.loads(line)
        if self.on_event is None or event["type"] not in WATCH_TYPES:
            return 0.0
        return self.on_event(resource, event) or 0.0


@contextmanager
def run_fault_proxy(plane: ControlPlane, folder: Path) -> Iterator[FaultProxy]:
    """A proxy in front of the API server of `plane`, whose certificate authority it is trusted by."""
    proxy = FaultProxy(plane, folder)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@contextmanager
def _within(chosen: set[str], resources: tuple[str, ...]) -> Iterator[None]:
    """These are among the chosen ones while this lasts, and none is afterwards."""
    chosen.update(resources)
    try:
        yield
    finally:
        chosen.clear()


def _refused(refusal: Refusal) -> web.Response:
    headers = {"Content-Type": "application/json"}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    return web.Response(status=refusal.code, body=refusal.content(), headers=headers)


async def _met(fate: Fate, request: web.Request, body: bytes = b"") -> web.StreamResponse:
    """What is left of an answer with that fate."""
    if fate is Fate.STALL:
        half = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
        await half.prepare(request)
        await half.write(body[: len(body) // 2])
    if fate is not Fate.DROP:
        await _for_ever()
    return _lost(request)


async def _for_ever() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


def _lost(request: web.Request) -> web.StreamResponse:
    """The connection breaks without an answer."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
