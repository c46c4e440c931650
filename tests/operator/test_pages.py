"""Lists are read page by page, and no page is larger than an operator can take, whatever tenants have put into it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes.aio.client import Configuration

from finetune_operator import decoding, wire
from finetune_operator.cache import Cache
from finetune_operator.cluster import Cluster
from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.wire import MOST_PAGE, READ_BYTES, Wire
from tests.operator.loopback import answering
from tests.operator.raw import child, controlled, job, pod, pytorch_job


def named(number: int) -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "team",
            "name": str(number),
            "uid": str(number),
            "resourceVersion": "1",
            "managedFields": [{}],
        }
    }


def listed(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """The limit of each page that was asked for, when objects of these sizes are listed; objects and size of each page
    that was parsed."""
    asked: list[int] = []
    parsed: list[tuple[int, int]] = []

    async def serve(request: web.Request) -> web.Response:
        limit, start = int(request.query["limit"]), int(request.query.get("continue", 0))
        asked.append(limit)
        end = min(len(sizes), start + limit)
        items = [{**named(number), "spec": {"text": "x" * sizes[number]}} for number in range(start, end)]
        metadata = {"resourceVersion": "1"} | ({"continue": str(end)} if end < len(sizes) else {})
        return web.json_response({"kind": "ThingList", "apiVersion": "v1", "metadata": metadata, "items": items})

    async def decoded(content: bytes) -> Any:
        answer = await decoding.decoded(content)
        parsed.append((len(answer["items"]), len(content)))
        return answer

    async def run() -> None:
        found: list[dict[str, Any]] = []
        async with answering(serve) as url, Wire(Configuration(host=url)) as connected:
            async for page in connected.pages("things", {}, accept="application/json"):
                found += page
        assert [item["metadata"]["name"] for item in found] == [str(number) for number in range(len(sizes))]
        assert not any("managedFields" in item["metadata"] for item in found)  # more than all the rest

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wire, "decoded", decoded)
        asyncio.run(run())
    return asked, parsed


@pytest.mark.parametrize(("size", "least", "most"), [(10, MOST_PAGE, MOST_PAGE), (100_000, 7, 15), (1_400_000, 1, 1)])
def test_a_page_has_as_many_objects_as_fit(size: int, least: int, most: int) -> None:
    asked, _ = listed([size] * (2000 if size < 1000 else 120))
    assert least <= asked[-1] <= most


SMALL, BIG, WHOLE = 500, 1_400_000, 4_000_000


@pytest.mark.parametrize(
    ("sizes", "requests"),
    [
        ([BIG] * 25, 30),
        ([BIG] * 25 + [SMALL] * 500, 45),
        ([SMALL] * 500 + [BIG] * 50, 75),
        ([SMALL] * 499 + [WHOLE] + [SMALL] * 500, 30),
        (([SMALL] * 20 + [BIG] * 3) * 3, 30),
        ([WHOLE] * 3, 6),
    ],
    ids=["first", "before others", "last", "one", "among others", "larger than what is read"],
)
def test_no_page_is_parsed_that_is_too_large_wherever_the_large_objects_are(sizes: list[int], requests: int) -> None:
    asked, parsed = listed(sizes)
    assert all(size <= READ_BYTES or count == 1 for count, size in parsed)
    assert len(asked) <= requests


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([1, 100, 1500, 5000]), min_size=1, max_size=150))
def test_every_object_is_read_once_whatever_the_sizes(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wire, "PAGE_BYTES", 3000)
        patched.setattr(wire, "READ_BYTES", 4500)
        asked, parsed = listed(sizes)
    assert all(size <= 4500 or count == 1 for count, size in parsed)
    assert len(asked) <= 5 + 4 * len(sizes)


def compared(kind: str, *items: Any) -> list[Any]:
    """What a resync is given of a list."""

    async def serve(_: web.Request) -> web.Response:
        return web.json_response({"metadata": {"resourceVersion": "1"}, "items": items})

    async def run() -> list[Any]:
        async with answering(serve) as url, Cluster(Wire(Configuration(host=url))) as cluster:
            return [item async for page in cluster.list_metadata(kind, None) for item in page]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "raw", "is_missed"),
    [
        (FINETUNE_PLURAL, job(), True),
        (PYTORCH_PLURAL, pytorch_job(), True),
        (PODS_PLURAL, pod(), True),
        (PODS_PLURAL, controlled(child("guard-verify-x", attempt=""), "guard-job-uid-verify", "Job"), True),
        (PODS_PLURAL, controlled(pod(), "somebodys"), False),
        (PYTORCH_PLURAL, controlled(pytorch_job()), False),
    ],
)
def test_what_no_event_told_of_is_missed_as_it_is_listed_if_it_is_ours(kind: str, raw: Any, is_missed: bool) -> None:
    cache = Cache()
    if kind != FINETUNE_PLURAL:
        cache.job_read(job({"attempt": 1}))
    (listed,) = compared(kind, raw)
    assert cache.is_current(kind, raw) is not is_missed
    assert cache.is_current(kind, listed) is not is_missed


@pytest.mark.parametrize("kind", [FINETUNE_PLURAL, PYTORCH_PLURAL, PODS_PLURAL])
def test_of_what_is_compared_nothing_is_kept_that_tenants_can_fill(kind: str) -> None:
    """Those that no watch has told of wait for its event, all at once."""
    filled = pytorch_job()
    filled["metadata"]["labels"] |= {f"label-{number}": "x" for number in range(1000)}
    filled["metadata"]["annotations"] = {"text": "x" * 1000}
    filled["metadata"]["ownerReferences"] += [{"uid": str(number), "text": "x"} for number in range(1000)]
    whole, bare = compared(kind, filled, named(1))
    assert whole == {"metadata": pytorch_job()["metadata"]}
    assert bare["metadata"].keys() == {"namespace", "name", "uid", "resourceVersion"}
