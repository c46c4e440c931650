"""Whatever a watch or a list says, kopf is given what it can read, or a connection that broke."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import pytest
from aiohttp import web
from kopf._cogs.clients.api import iter_jsonlines  # what reads the lines in kopf

from finetune_operator import kopf_defences
from finetune_operator.kopf_defences import ReadableResponse

T = TypeVar("T")
GOOD: dict[str, Any] = {"metadata": {"uid": "u", "name": "a", "resourceVersion": "1"}, "spec": {"x": "\u2028\n"}}


def event(kind: str = "ADDED", **metadata: Any) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": kind, "object": {**GOOD, "metadata": {**GOOD["metadata"], **metadata}}}).encode()


def asked(answer: list[bytes], use: Callable[[aiohttp.ClientResponse], Awaitable[T]], *, watch: bool = True) -> T:
    """What `use` makes of an answer that comes in these pieces."""

    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in answer:
            await response.write(piece)
            await asyncio.sleep(0)
        return response

    async def run() -> T:
        app = web.Application()
        app.router.add_get("/", serve)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        try:
            async with (
                aiohttp.ClientSession(response_class=ReadableResponse) as session,
                session.get(f"http://{host}:{port}/" + ("?watch=true" if watch else "")) as response,
            ):
                return await use(response)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def events(*pieces: bytes) -> list[Any]:
    """The events that kopf reads."""

    async def read(response: aiohttp.ClientResponse) -> list[Any]:
        return [json.loads(line) async for line in iter_jsonlines(response.content)]

    return asked(list(pieces), read)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kopf_defences, "PAUSE_SECONDS", 0)


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_events_come_whole_however_they_are_cut(size: int) -> None:
    text = b"\n".join([event(), event("MODIFIED"), event("DELETED"), event("BOOKMARK")]) + b"\n"
    found = events(*(text[start : start + size] for start in range(0, len(text), size)))
    assert [one["type"] for one in found] == ["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    assert all(one["object"] == GOOD for one in found)


def test_an_object_nested_a_thousand_levels_deep_costs_only_its_depths() -> None:
    nested = '{"f:a":' * 3000 + "{}" + "}" * 3000
    line = event()[:-2] + b',"status":{"deep":' + nested.encode() + b',"phase":"Running"}}}'
    (found,) = events(line + b"\n")
    assert found["object"]["status"]["phase"] == "Running"
    managed = event()[:-2] + b',"more":1}}'
    assert (
        events(managed.replace(b'"uid"', b'"managedFields":[' + nested.encode() + b'],"uid"') + b"\n")[0]["type"]
        == "ADDED"
    )


@pytest.mark.parametrize("error", [{"code": 410}, {"code": 500, "message": "no"}, {}, {"code": None}, {"code": "x"}])
def test_any_error_of_a_watch_is_a_reason_to_list_again(error: dict[str, Any]) -> None:
    (found,) = events(json.dumps({"type": "ERROR", "object": error}).encode() + b"\n")
    assert (found["type"], found["object"]["code"]) == ("ERROR", 410)


@pytest.mark.parametrize(
    "line",
    [
        b"<html>",
        b"null",
        b"[]",
        b"1",
        b"{}",
        b'{"type":"ADDED"}',
        b'{"type":"ADDED","object":null}',
        b'{"type":"ADDED","object":{}}',
        b'{"type":"ADDED","object":{"metadata":{"uid":1,"name":"a","resourceVersion":"1"}}}',
        b'{"type":["ADDED"],"object":{"metadata":{"uid":"1","name":"a","resourceVersion":"1"}}}',
        b'{"type":"SOMETHING","object":{"metadata":{"uid":"1","name":"a","resourceVersion":"1"}}}',
        b'{"type":"ERROR","object":"gone"}',
    ],
)
def test_nonsense_in_a_watch_is_a_connection_that_broke_after_what_came_before(line: bytes) -> None:
    seen: list[Any] = []

    async def read(response: aiohttp.ClientResponse) -> None:
        async for one in iter_jsonlines(response.content):
            seen.append(json.loads(one))  # noqa: PERF401  what comes before the end is kept

    with pytest.raises(aiohttp.ClientPayloadError):
        asked([event() + b"\n" + line + b"\n"], read)
    assert [one["type"] for one in seen] == ["ADDED"]


def test_half_an_event_at_the_end_of_a_watch_is_none() -> None:
    assert len(events(event() + b"\n" + event()[:40])) == 1


def test_a_list_comes_without_what_kopf_cannot_name() -> None:
    async def read(response: aiohttp.ClientResponse) -> Any:
        return await response.json()

    items = [GOOD, None, 1, {}, {"metadata": None}, {"metadata": {"name": "a"}}, GOOD]
    text = json.dumps({"kind": "List", "metadata": {"resourceVersion": "5"}, "items": items}).encode()
    found = asked([text], read, watch=False)
    assert found["items"] == [GOOD, GOOD]
    assert asked([b'{"kind":"APIGroupList","groups":[]}'], read, watch=False)["groups"] == []
    with pytest.raises(aiohttp.ClientPayloadError):
        asked([b"<html>"], read, watch=False)
