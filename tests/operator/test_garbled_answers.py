"""Whatever an API server answers with, a request ends in what was asked for or in an error that names the cause.

An answer that cannot be read is never taken for the absence of what was asked for: attempts end by that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError, Unavailable
from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.wire import RETRY_AFTER_LIMIT_SECONDS, Raw, Wire
from tests.faults.faults import ANSWERS, LISTS, Garbled, status
from tests.operator.raw import job

Answer = tuple[int, bytes, Mapping[str, str]]
Use = Callable[[Cluster], Awaitable[Any]]
BODY = {"metadata": {"name": "a"}}

READS: Mapping[str, Use] = {
    "job": lambda cluster: cluster.get_job("team", "guard"),
    "pytorchjob": lambda cluster: cluster.get_pytorch_job("team", "guard"),
    "pod": lambda cluster: cluster.get_pod("team", "guard"),
    "configmap": lambda cluster: cluster.get_config_map("team", "guard"),
    "batch-job": lambda cluster: cluster.get_batch_job("team", "guard"),
    "secret": lambda cluster: cluster.get_secret("team", "guard"),
    "status written": lambda cluster: cluster.update_job_status(job(), {}),
    "configmap made": lambda cluster: cluster.create_config_map("team", BODY),
    "pytorchjob made": lambda cluster: cluster.create_pytorch_job("team", BODY),
    "batch job made": lambda cluster: cluster.create_batch_job("team", BODY),
}


async def _all(pages: Any) -> list[Any]:
    return [page async for page in pages]


READS_LISTS: Mapping[str, Use] = {
    **{
        kind: lambda cluster, kind=kind: _all(cluster.list_metadata(kind, None))  # type: ignore[misc]
        for kind in (FINETUNE_PLURAL, PYTORCH_PLURAL, PODS_PLURAL)
    },
    "pods of an attempt": lambda cluster: _all(cluster.list_pods("team", job_uid="u", attempt=1)),
    "pods of a verification": lambda cluster: _all(cluster.list_batch_job_pods("team", uid="u")),
}
OBJECT: Raw = {"apiVersion": "v1", "kind": "Thing", **job()}
LIST: Raw = {"apiVersion": "v1", "kind": "ThingList", "metadata": {"resourceVersion": "9"}, "items": [OBJECT, OBJECT]}
READABLE = {"items null": 0, "null items": 2, "items of another kind": 2, "items without a name": 2}
"""Lists of which something can be made, and how many objects."""


class Server:
    """Answers everything in the same way."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._answer: Answer = (200, b"", {})
        self._cluster = runner.run(self._start())

    def asked(self, answer: Answer, use: Use) -> Any:
        """What `use` makes of an answer."""
        self._answer = answer
        return self._runner.run(asyncio.wait_for(use(self._cluster), 10))

    def stop(self) -> None:
        """End."""
        self._runner.run(self._stop())

    async def _start(self) -> Cluster:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._web = web.AppRunner(app, shutdown_timeout=0.1)
        await self._web.setup()
        await web.TCPSite(self._web, "127.0.0.1", 0).start()
        host, port = self._web.addresses[0][:2]
        return await Cluster(Wire(Configuration(host=f"http://{host}:{port}"))).__aenter__()

    async def _stop(self) -> None:
        await self._cluster.__aexit__(None, None, None)
        await self._web.cleanup()

    async def _serve(self, request: web.Request) -> web.Response:
        code, content, headers = self._answer
        return web.Response(status=code, body=content, headers={"Content-Type": "application/json", **headers})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all tests: a start takes longer than a request."""
    with asyncio.Runner() as runner:
        server = Server(runner)
        yield server
        server.stop()


def of(whole: Raw, shape: Garbled) -> Answer:
    """A good answer, garbled."""
    return 200, shape.change(json.dumps(whole).encode()), {}


@pytest.mark.parametrize("what", READS)
@pytest.mark.parametrize("shape", ANSWERS)
def test_an_answer_that_cannot_be_read_is_no_answer(server: Server, what: str, shape: str) -> None:
    with pytest.raises(Unavailable):
        server.asked(of(OBJECT, ANSWERS[shape]), READS[what])


@pytest.mark.parametrize("what", READS_LISTS)
@pytest.mark.parametrize("shape", LISTS)
def test_a_list_that_cannot_be_read_is_not_empty(server: Server, what: str, shape: str) -> None:
    answer = of(LIST, LISTS[shape])
    if shape not in READABLE:
        with pytest.raises(Unavailable):
            server.asked(answer, READS_LISTS[what])
        return
    found = server.asked(answer, READS_LISTS[what])
    assert sum(len(page) if isinstance(page, list) else 1 for page in found if page) == READABLE[shape]


@pytest.mark.parametrize("code", [300, 302, 400, 401, 403, 404, 405, 409, 410, 418, 422, 429, 500, 503, 599])
@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"null", b'"no"', b'{"message":{},"reason":[]}'])
def test_any_refusal_is_an_error_of_ours(server: Server, code: int, content: bytes) -> None:
    for what, use in {**READS, **READS_LISTS}.items():
        if code == 404 and what in READS and " " not in what:
            assert server.asked((code, content, {}), use) is None
        else:
            with pytest.raises(ApiError) as caught:
                server.asked((code, content, {}), use)
            assert str(caught.value)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        ("999999999", RETRY_AFTER_LIMIT_SECONDS),
        ("9" * 400, RETRY_AFTER_LIMIT_SECONDS),
        ("-1", None),
        ("1.5", None),
        ("Fri, 31 Jan 2031 23:59:59 GMT", None),
        ("", None),
    ],
)
def test_a_server_can_ask_to_be_left_alone_and_not_for_ever(server: Server, header: str, seconds: float | None) -> None:
    answer = 429, json.dumps(status(429)).encode(), {"Retry-After": header}
    with pytest.raises(Unavailable) as caught:
        server.asked(answer, READS["job"])
    assert caught.value.retry_after_seconds == seconds


@pytest.mark.parametrize("levels", [10, 300, 1500, 5000])
def test_an_object_costs_only_its_depths_and_no_other_object(server: Server, levels: int) -> None:
    deep = json.dumps({**OBJECT, "spec": {"deep": "HERE"}}).replace('"HERE"', "[" * levels + "]" * levels)
    found = server.asked((200, deep.encode(), {}), READS["job"])
    assert found["metadata"] == OBJECT["metadata"]
    both = json.dumps({**LIST, "items": ["HERE", OBJECT]}).replace('"HERE"', deep)
    (page,) = server.asked((200, both.encode(), {}), READS_LISTS[PODS_PLURAL])
    assert [item["metadata"] for item in page] == 2 * [OBJECT["metadata"]]
