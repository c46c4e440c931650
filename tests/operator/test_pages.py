"""Lists are read page by page, and no page is larger than an operator can take, whatever tenants have put into it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from finetune_operator.wire import LEAST_PAGE, MOST_PAGE, PAGE_BYTES, Wire
from tests.operator.loopback import answering


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


def listed(count: int, size: int) -> tuple[int, list[int]]:
    """How many of `count` objects of `size` bytes are read, and the size of each page that was asked for."""
    asked: list[int] = []

    async def serve(request: web.Request) -> web.Response:
        limit, start = int(request.query["limit"]), int(request.query.get("continue", 0))
        asked.append(limit)
        end = min(count, start + limit)
        items = [{**named(number), "spec": {"text": "x" * size}} for number in range(start, end)]
        metadata = {"resourceVersion": "1"} | ({"continue": str(end)} if end < count else {})
        return web.json_response({"kind": "ThingList", "apiVersion": "v1", "metadata": metadata, "items": items})

    async def run() -> int:
        found: list[dict[str, Any]] = []
        async with answering(serve) as url, Wire(Configuration(host=url)) as wire:
            async for page in wire.pages("things", {}, accept="application/json"):
                found += page
        assert [item["metadata"]["name"] for item in found] == [str(number) for number in range(count)]
        assert not any("managedFields" in item["metadata"] for item in found)  # more than all the rest
        return len(found)

    return asyncio.run(run()), asked


@pytest.mark.parametrize(("size", "least", "most"), [(10, MOST_PAGE, MOST_PAGE), (100_000, 15, 30), (1_400_000, 5, 5)])
def test_a_page_has_as_many_objects_as_fit(size: int, least: int, most: int) -> None:
    count = 2000 if size < 1000 else 120
    found, asked = listed(count, size)
    assert found == count
    assert least <= asked[-1] <= most
    assert all(limit * size <= 2 * PAGE_BYTES or limit <= LEAST_PAGE for limit in asked[1:])
