"""Whatever a watch or a list says, kopf is given what it can read, or a connection that broke.

What kopf then does is not told here but tried: its own code makes the requests, where it decides by what it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp
import kopf
import pytest
from aiohttp import web
from kopf._cogs.clients import api, errors
from kopf._cogs.clients.api import iter_jsonlines  # what reads the lines in kopf
from kopf._cogs.clients.auth import APIContext, vault_var
from kopf._cogs.clients.scanning import scan_resources
from kopf._cogs.structs.credentials import Vault

from finetune_operator import watch_answers
from finetune_operator.watch_answers import SIGN_OF_LIFE, ReadableResponse
from tests.faults.faults import LISTS
from tests.operator.loopback import answering

T = TypeVar("T")
READABLE = ("items null", "null items", "items of another kind", "items without a name")
"""Lists of another shape than usual, of which something can be made."""
GOOD: dict[str, Any] = {"metadata": {"uid": "u", "name": "a", "resourceVersion": "1"}, "spec": {"x": "\u2028\n"}}


def event(kind: str = "ADDED", **metadata: Any) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": kind, "object": {**GOOD, "metadata": {**GOOD["metadata"], **metadata}}}).encode()


TROUBLES: list[str] = []
"""What was said of the watches since the test began."""


TAKEN: list[tuple[str, Any]] = []
"""What went past kopf, likewise."""


BEGUN: list[tuple[str, str | None]] = []
"""Of which kinds and places everything was told, likewise."""


class Response(ReadableResponse):
    """Notes what is said of it."""

    lists_again = staticmethod(lambda: TROUBLES.append("lists again"))
    streaming_refused = staticmethod(lambda: TROUBLES.append("streaming refused"))


Response.listed = staticmethod(lambda kind, namespace, raw: TAKEN.append((kind, raw)))
Response.begun = staticmethod(lambda kind, namespace: BEGUN.append((kind, namespace)))


def asked(
    answer: list[bytes],
    use: Callable[[aiohttp.ClientResponse], Awaitable[T]],
    *,
    query: str = "",
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    place: str = "",
) -> T:
    """What `use` makes of an answer that comes in these pieces."""

    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        for piece in answer:
            await response.write(piece)
            await asyncio.sleep(0)
        return response

    async def run() -> T:
        async with (
            answering(serve) as url,
            aiohttp.ClientSession(response_class=Response) as session,
            session.get(f"{url}/apis/example.com/v1/{place}things{query}") as response,
        ):
            return await use(response)

    return asyncio.run(run())


async def lines(response: aiohttp.ClientResponse) -> list[Any]:
    """The events that kopf reads."""
    assert response.status == 200
    return [json.loads(line) async for line in iter_jsonlines(response.content)]


async def objects(response: aiohttp.ClientResponse) -> Any:
    """The list that kopf reads."""
    assert response.status == 200
    return await response.json()


def events(*pieces: bytes, status: int = 200, query: str = "?watch=true") -> list[Any]:
    """The events that kopf reads of a watch."""
    return asked(list(pieces), lines, query=query, status=status)


ANEW = {"type": "ERROR", "object": {"code": 410}}


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    TROUBLES.clear()
    TAKEN.clear()
    BEGUN.clear()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_answers, "PAUSE_SECONDS", 0)


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_events_come_whole_however_they_are_cut(size: int) -> None:
    text = b"\n".join([event(), event("MODIFIED"), event("DELETED"), event("BOOKMARK")]) + b"\n"
    found = events(*(text[start : start + size] for start in range(0, len(text), size)))
    assert [one["type"] for one in found] == ["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    assert all(one["object"] == GOOD for one in found)


@pytest.mark.parametrize("levels", [1, 100, 245, 250, 252, 253, 254, 255, 256, 600, 1020, 1022, 1024, 1030, 3000])
def test_an_object_costs_only_its_depths_however_deep_it_is_nested(levels: int) -> None:
    nested = '{"f:a":' * levels + "{}" + "}" * levels
    line = event()[:-2] + b',"status":{"deep":' + nested.encode() + b',"phase":"Running"}}}'
    (found,) = events(line + b"\n")
    assert found["object"]["status"]["phase"] == "Running"
    managed = line.replace(b'"uid"', b'"managedFields":[' + nested.encode() + b'],"uid"')
    (found,) = events(managed + b"\n")
    assert found["type"] == "ADDED"
    assert "managedFields" not in found["object"]["metadata"]


@pytest.mark.parametrize("error", [{"code": 410}, {"code": 500, "message": "no"}, {}, {"code": None}, {"code": "x"}])
def test_any_error_of_a_watch_is_a_reason_to_list_again(error: dict[str, Any]) -> None:
    found = events(event() + b"\n" + json.dumps({"type": "ERROR", "object": error}).encode() + b"\n")
    assert found == [json.loads(event()), ANEW]
    assert TROUBLES == ["lists again"]


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
        b'{"type":"BOOKMARK","object":{}}',
        b'{"type":"BOOKMARK","object":{"metadata":null}}',
    ],
)
def test_nonsense_in_a_watch_is_a_reason_to_list_again_after_what_came_before(line: bytes) -> None:
    assert events(event() + b"\n" + line + b"\n") == [json.loads(event()), ANEW]
    assert TROUBLES == ["lists again"]


def test_half_an_event_at_the_end_of_a_watch_is_none() -> None:
    assert events(event() + b"\n" + event()[:40]) == [json.loads(event())]
    assert TROUBLES == []


@pytest.mark.parametrize(
    ("status", "anew"), [(400, True), (409, True), (410, True), (422, True), (404, False), (403, False), (500, False)]
)
def test_a_watch_that_is_refused_is_begun_anew_by_us_or_by_kopf(status: int, anew: bool) -> None:
    async def read(response: aiohttp.ClientResponse) -> tuple[int, list[Any]]:
        return response.status, await lines(response) if response.status == 200 else []

    found = asked([b'{"kind":"Status"}'], read, query="?watch=true", status=status)
    assert found == ((200, [ANEW]) if anew else (503 if status == 404 else status, []))


def test_a_server_that_does_not_stream_lists_is_not_asked_to_again() -> None:
    assert events(b"{}", status=422, query="?watch=true&sendInitialEvents=true") == [ANEW]
    assert TROUBLES == ["streaming refused", "lists again"]


@pytest.mark.parametrize("pieces", [[], [event() + b"\n"], [event() + b"\n", event()[:40]]])
def test_a_watch_that_breaks_off_before_it_told_of_all_objects_begins_anew(pieces: list[bytes]) -> None:
    initial = "?watch=true&sendInitialEvents=true"
    assert events(*pieces, query=initial)[-1] == ANEW
    assert TROUBLES == ["lists again"]
    TROUBLES.clear()
    TAKEN.clear()
    told = [event() + b"\n", event("BOOKMARK") + b"\n"]
    assert [one["type"] for one in events(*told, query=initial)] == ["BOOKMARK"]
    assert TAKEN == [("things", GOOD)]
    assert TROUBLES == []
    assert BEGUN == [("things", None)]


@pytest.mark.parametrize(("place", "namespace"), [("", None), ("namespaces/team/", "team")])
@pytest.mark.parametrize("token", ["", "more"])
def test_a_kind_is_known_once_all_of_it_was_told(place: str, namespace: str | None, token: str) -> None:
    text = json.dumps({"kind": "List", "metadata": {"continue": token}, "items": [GOOD]}).encode()
    asked([text], objects, query="?limit=50", place=place)
    assert ([] if token else [("things", namespace)]) == BEGUN
    BEGUN.clear()
    told = [event() + b"\n", *([] if token else 2 * [event("BOOKMARK") + b"\n"])]
    asked(told, lines, query="?watch=true&sendInitialEvents=true", place=place)
    assert ([] if token else [("things", namespace)]) == BEGUN
    BEGUN.clear()
    asked([event("BOOKMARK") + b"\n"], lines, query="?watch=true&resourceVersion=7", place=place)
    assert BEGUN == []


def test_what_there_is_when_a_watch_begins_goes_past_kopf_but_for_a_sign_of_life() -> None:
    count = 3 * SIGN_OF_LIFE
    listed = [event(resourceVersion=str(number)) + b"\n" for number in range(1, count + 1)]
    told = [*listed, event("BOOKMARK") + b"\n", event(resourceVersion="new") + b"\n"]
    found = events(b"".join(told), query="?watch=true&sendInitialEvents=true")
    versions = [one["object"]["metadata"]["resourceVersion"] for one in found]
    assert versions == [str(SIGN_OF_LIFE), str(2 * SIGN_OF_LIFE), str(count), "1", "new"]
    taken = [int(raw["metadata"]["resourceVersion"]) for _, raw in TAKEN]
    assert taken == list(range(1, count + 1))


def test_an_object_that_cannot_be_taken_in_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(_: str, __: str | None, raw: Any) -> None:
        if raw["metadata"]["name"] == "odd":
            raise KeyError("labels")
        TAKEN.append(("", raw))

    monkeypatch.setattr(Response, "listed", staticmethod(take))
    told = [event(name="odd"), event(), event("BOOKMARK")]
    assert len(events(b"\n".join(told) + b"\n", query="?watch=true&sendInitialEvents=true")) == 1
    assert TAKEN == [("", GOOD)]


@pytest.mark.parametrize(
    ("asked_for", "seconds"),
    [
        ("7", "7"),
        ("0", "0"),
        ("86400", "30"),
        ("9" * 400, "30"),
        ("Fri, 31 Jan 2031 23:59:59 GMT", "1"),
        ("-1", "1"),
        ("1e9", "1"),
        (None, "1"),
    ],
)
def test_kopf_waits_as_long_as_a_server_asks_and_no_longer(asked_for: str | None, seconds: str) -> None:
    async def read(response: aiohttp.ClientResponse) -> str:
        return response.headers["Retry-After"]

    headers = {"Retry-After": asked_for} if asked_for is not None else {}
    assert asked([b"{}"], read, query="?watch=true", status=429, headers=headers) == seconds


@pytest.mark.parametrize("shape", [name for name in LISTS if name not in READABLE])
def test_a_list_of_another_shape_is_a_connection_that_broke(shape: str) -> None:
    text = json.dumps({"kind": "List", "metadata": {"resourceVersion": "5"}, "items": [GOOD]}).encode()
    with pytest.raises(aiohttp.ClientPayloadError):
        asked([LISTS[shape].change(text)], objects, query="?limit=50")


@pytest.mark.parametrize("shape", READABLE)
def test_of_a_list_is_taken_what_has_a_name(shape: str) -> None:
    text = json.dumps({"kind": "List", "metadata": {"resourceVersion": "5"}, "items": [GOOD]}).encode()
    found = asked([LISTS[shape].change(text)], objects, query="?limit=50")
    assert found["items"] == []
    assert ([] if shape == "items null" else [("things", GOOD)]) == TAKEN


def test_what_has_no_name_is_left_out_of_a_list() -> None:
    items = [GOOD, None, 1, {}, {"metadata": None}, {"metadata": {"name": "a"}}, GOOD]
    text = json.dumps({"kind": "List", "metadata": {"resourceVersion": "5"}, "items": items}).encode()
    assert asked([text], objects, query="?limit=50")["items"] == []
    assert TAKEN == 2 * [("things", GOOD)]


@pytest.mark.parametrize(("text", "status"), [(b"<html>", 200), (b'{"kind":"Status"}', 410), (b"{}", 400)])
def test_a_list_that_cannot_be_read_or_is_too_old_is_a_connection_that_broke(text: bytes, status: int) -> None:
    with pytest.raises(aiohttp.ClientPayloadError):
        asked([text], objects, query="?limit=50", status=status)


LOGGER = logging.getLogger(__name__)
QUERIES = {"watch": "?watch=true", "initial watch": "?watch=true&sendInitialEvents=true", "list": "?limit=50"}
STATUS = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "no", "message": "It is refused."}
BODIES: Mapping[str, bytes | None] = {
    "a status": json.dumps(STATUS).encode(),
    "a status cut off": json.dumps(STATUS).encode()[:40],
    "another object": b'{"message":"no"}',
    "text": b"Too many requests, please try again later.\n",
    "html": b"<html><body><h1>503 Service Unavailable</h1></body></html>\n",
    "nothing": b"",
    "a connection that breaks": None,
    "blanks": b"  \n",
    "null": b"null",
    "a list": b'["no"]',
    "a number": b"7",
    "no text": b"\xff\xfe\x00\x80",
    "too deep": b"[" * 3000 + b"]" * 3000,
}
"""What a refusal may say."""
AGAIN: Mapping[int, type[Exception] | None] = {
    401: errors.APIUnauthorizedError,  # kopf logs in again
    403: errors.APIForbiddenError,  # after this and all below it asks again, as long as it may
    429: errors.APITooManyRequestsError,
    404: errors.APIServerError,
    500: errors.APIServerError,
    502: errors.APIServerError,
    503: errors.APIServerError,
    504: errors.APIServerError,
    400: None,  # kopf is not told: the watch begins anew, or the list is a connection that broke
    409: None,
    410: None,
    422: None,
}
"""HTTP status -> what kopf makes of a watch or list that is refused with it."""


async def say(request: web.Request, status: int, body: bytes | None, **headers: str) -> web.StreamResponse:
    """Answer; None breaks off in the middle."""
    if body is not None:
        return web.Response(status=status, body=body, headers=headers)
    response = web.StreamResponse(status=status, headers={**headers, "Content-Length": "100"})
    await response.prepare(request)
    await response.write(b"{")
    if request.transport is not None:
        request.transport.close()
    return response


def as_kopf(
    serve: Callable[[web.Request], Awaitable[web.StreamResponse]], use: Callable[[APIContext], Awaitable[T]]
) -> T:
    """What kopf makes of an API server that answers so."""

    async def run() -> T:
        async with answering(serve) as url, asyncio.timeout(60):
            session = aiohttp.ClientSession(response_class=Response)
            login = kopf.AiohttpSession(server=url, aiohttp_session=session)
            context, vault = APIContext(login), Vault()
            await vault.populate({"login": login})
            vault_var.set(vault)
            try:
                return await use(context)
            finally:
                await context.close()

    return asyncio.run(run())


def kopf_asks(*backoffs: float, timeout: float = 15.0) -> kopf.OperatorSettings:
    """Settings of kopf's that wait so long after each refusal, and so long for an answer."""
    settings = kopf.OperatorSettings()
    settings.networking.error_backoffs = backoffs
    settings.networking.request_timeout = timeout
    return settings


@pytest.mark.parametrize("status", AGAIN)
def test_kopf_goes_by_the_status_of_a_refusal_whatever_it_says(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_answers, "PAUSE_SECONDS", 100)  # kopf has its own

    async def serve(request: web.Request) -> web.StreamResponse:
        return await say(request, status, BODIES[request.match_info["path"]], **{"Retry-After": "7"})

    async def ask(context: APIContext) -> dict[tuple[str, str], Exception | None]:
        found: dict[tuple[str, str], Exception | None] = {}
        for body, (name, query) in itertools.product(BODIES, QUERIES.items()):
            try:
                await api.request("get", f"{body}{query}", settings=kopf_asks(), logger=LOGGER, context=context)
            except Exception as error:
                found[body, name] = error
            else:
                found[body, name] = None
        return found

    expected = AGAIN[status]
    for (body, query), found in as_kopf(serve, ask).items():
        if expected is None:
            assert found is None, (body, query)
            continue
        assert type(found) is expected, (body, query)
        assert isinstance(found, errors.APIError)
        assert found.headers["Retry-After"] == "7"
        assert found.message == (STATUS["message"] if body == "a status" else None)


KINDS: Mapping[str, Any] = {
    "/api": {"versions": ["v1"]},
    "/api/v1": {"resources": [{"kind": "Pod", "name": "pods", "singularName": "pod", "namespaced": True}]},
    "/apis": {"groups": [{"name": "a.b", "versions": [{"version": "v2"}], "preferredVersion": {"version": "v2"}}]},
    "/apis/a.b/v2": {"resources": [{"kind": "Thing", "name": "things", "singularName": "", "namespaced": True}]},
}
"""Where kopf finds out which kinds there are, and what it is told there."""


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, "silence"), *itertools.product([200, 204, 400, 403, 404, 405, 410, 429, 500, 503], BODIES)],
)
def test_kopf_asks_until_it_is_told_which_kinds_there_are(status: int, body: str) -> None:
    asked_for: dict[str, int] = {}
    paths = {"/api", "/apis"} if status == 404 else set(KINDS)  # of a version, 404 says that it was taken away

    async def serve(request: web.Request) -> web.StreamResponse:
        count = asked_for[request.path] = asked_for.get(request.path, 0) + 1
        if count > 2 or request.path not in paths:
            return web.json_response(KINDS[request.path])
        if body == "silence":
            response = web.StreamResponse(status=status, headers={"Content-Length": "100"})
            await response.prepare(request)
            await asyncio.sleep(2)
            return response
        return await say(request, status, BODIES[body], **{"Retry-After": "0"})

    async def scan(_: APIContext) -> set[str]:
        found = await scan_resources(settings=kopf_asks(*[0] * 10, timeout=1.0), logger=LOGGER)
        return {kind.plural for kind in found}

    assert as_kopf(serve, scan) == {"pods", "things"}
    assert asked_for == {path: 3 if path in paths else 1 for path in KINDS}


def test_a_group_whose_last_kind_was_taken_away_has_none() -> None:
    async def serve(request: web.Request) -> web.StreamResponse:
        gone = request.path == "/apis/a.b/v2"
        return await say(request, 404, b"404 page not found") if gone else web.json_response(KINDS[request.path])

    async def scan(_: APIContext) -> set[str]:
        found = await scan_resources(settings=kopf_asks(), logger=LOGGER)
        return {kind.plural for kind in found}

    assert as_kopf(serve, scan) == {"pods"}


@pytest.mark.parametrize(
    "answer", [b"garbage\r\n\r\n", b"\x15\x03\x01\x00", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"]
)
def test_an_answer_that_is_no_http_is_a_connection_that_broke(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with server, aiohttp.ClientSession(response_class=Response) as session:
            with pytest.raises(aiohttp.ClientConnectionError):
                await session.get(f"http://{host}:{port}/api/v1/things?watch=true")

    asyncio.run(run())
