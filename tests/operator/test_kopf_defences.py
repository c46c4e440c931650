"""Of kopf only the watching is used: whatever objects look like, it asks for nothing else and tells of every event."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import kopf
import pytest
from aiohttp import web
from kopf._core.actions import application
from kubernetes.aio.client import Configuration

from finetune_operator.cluster import Cluster
from finetune_operator.handlers import watch
from finetune_operator.kopf_defences import NO_FINALIZER, kopf_settings
from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.wire import Wire
from tests.operator.loopback import answering
from tests.operator.raw import job, pod, pytorch_job

KOPFS = kopf.OperatorSettings().persistence.finalizer
"""The finalizer that operators made with kopf give to what they look after."""
PLACES = {
    "apis/finetune.dev/v1alpha1": (FINETUNE_PLURAL, "FineTuneJob", job),
    "apis/kubeflow.org/v1": (PYTORCH_PLURAL, "PyTorchJob", pytorch_job),
    "api/v1": (PODS_PLURAL, "Pod", pod),
}
VERSIONS = ("8", "9", "10")
"""Of each object that a watch tells, one after the other."""
APART_SECONDS = 0.1
"""Between two events of an object: kopf tells only of the last of those that come at once (seconds)."""


def group(name: str, version: str) -> dict[str, Any]:
    """As discovery shows it."""
    found = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [found], "preferredVersion": found}


def told(metadata: dict[str, Any], seconds: float) -> tuple[list[tuple[str, str]], set[str]]:
    """Kind and version of each event that is told of three objects with that metadata; what was asked for but reads."""
    events: list[tuple[str, str]] = []
    asked: set[str] = set()

    async def tell(request: web.Request, seen: Any) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for version in VERSIONS:
            raw = seen(version=version)
            raw["metadata"] |= metadata
            await response.write(json.dumps({"type": "MODIFIED", "object": raw}).encode() + b"\n")
            await asyncio.sleep(APART_SECONDS)
        await asyncio.sleep(60)
        return response

    async def serve(request: web.Request) -> web.StreamResponse:
        path = request.path.strip("/")
        if request.method != "GET":
            asked.add(f"{request.method} {path}")
            return web.json_response({"kind": "Status", "code": 403}, status=403)
        if path == "api":
            return web.json_response({"versions": ["v1"]})
        if path == "apis":
            groups = [group("finetune.dev", "v1alpha1"), group("kubeflow.org", "v1")]
            return web.json_response({"groups": groups})
        place, _, plural = path.rpartition("/")
        if path in PLACES:
            known = [PLACES[path][:2], ("namespaces", "Namespace")]  # without which kopf watches nothing
            verbs = {"singularName": "", "namespaced": True, "verbs": ["list", "watch", "patch"]}
            return web.json_response({"resources": [{"name": name, "kind": kind, **verbs} for name, kind in known]})
        if place in PLACES and plural == PLACES[place][0]:
            if "watch" in request.query:
                return await tell(request, PLACES[place][2])
            return web.json_response({"metadata": {"resourceVersion": "7"}, "items": []})
        if path != "version":
            asked.add(f"{request.method} {path}")
        return web.json_response({})

    async def run() -> None:
        async with answering(serve) as url, Cluster(Wire(Configuration(host=url))) as cluster:
            stop = asyncio.Event()
            asyncio.get_running_loop().call_later(seconds, stop.set)
            await watch(
                cluster,
                lambda kind, raw, _: events.append((kind, raw["metadata"]["resourceVersion"])),
                (),
                stop,
                tells=lambda *_: None,
                begun=lambda *_: None,
                lists_again=lambda: None,
            )

    asyncio.run(run())
    return events, asked


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"finalizers": [KOPFS]},
        {"finalizers": [KOPFS], "deletionTimestamp": "2026-01-31T12:00:00Z"},
        {
            "annotations": {
                "kopf.zalando.org/last-handled-configuration": '{"spec":{}}\n',
                "kopf.zalando.org/touch-dummy": "2026-01-31T12:00:00Z",
                "kopf.zalando.org/create": '{"started":"2026-01-31T12:00:00Z","retries":1}',
            }
        },
    ],
    ids=["plain", "finalizer", "finalizer of what goes", "state of another operator"],
)
def test_what_another_operator_made_with_kopf_left_in_an_object_leads_to_no_request(metadata: dict[str, Any]) -> None:
    events, asked = told(metadata, 1.5)
    assert asked == set()
    for kind in (FINETUNE_PLURAL, PYTORCH_PLURAL, PODS_PLURAL):
        assert [version for seen, version in events if seen == kind] == list(VERSIONS)


def test_an_error_within_kopf_costs_no_later_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """kopf would drop whatever comes of the object for 1, 1, 2, 3, 5 … 610 seconds."""
    apply, failures = application.apply, iter([OSError("no"), OSError("no")] * 3)

    async def fails(**more: Any) -> Any:
        error = next(failures, None)
        if error is not None:
            raise error
        return await apply(**more)

    monkeypatch.setattr(application, "apply", fails)
    events, asked = told({}, 1.5)
    assert asked == set()
    for kind in (FINETUNE_PLURAL, PYTORCH_PLURAL, PODS_PLURAL):
        assert [version for seen, version in events if seen == kind] == list(VERSIONS)


def test_the_finalizer_that_kopf_is_told_of_is_none_that_an_object_can_have() -> None:
    """By the rule of the API server: a qualified name, with a domain in front of it or without."""
    name = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
    assert re.fullmatch(f"([-a-z0-9.]+/)?{name}", KOPFS)
    assert not re.fullmatch(f"([-a-z0-9.]+/)?{name}", NO_FINALIZER)
    assert kopf_settings(minor_version=0).persistence.finalizer == NO_FINALIZER


def test_a_page_of_kopfs_fits_into_memory_with_the_largest_objects_there_can_be() -> None:
    """1.5 MB is etcd's limit; a few pages, one of each watch, have to fit beside everything else."""
    chunk_size = kopf_settings(minor_version=33).watching.chunk_size
    assert chunk_size is not None
    assert chunk_size * 1.5 < 8
