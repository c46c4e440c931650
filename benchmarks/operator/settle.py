"""Brings jobs to their end as a cluster does: their pods succeed, and everything else follows by itself.

In place of a kubelet, which no control plane has, the status that one writes at the end is written to each pod.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Callable

from benchmarks.operator.load import JOBS, PYTORCH_JOBS, Client, LoadError, connect, in_parallel
from tests.cluster.api import Object, has_condition
from tests.cluster.control_plane import ControlPlane
from tests.cluster.scene import success

PATIENCE_SECONDS = 900
POLL_SECONDS = 2.0
"""A list of a thousand objects costs something itself."""

PODS = "/api/v1/namespaces/{}/pods"


def let_succeed(plane: ControlPlane, namespace: str, *, recorded: bool) -> float:
    """Let the pods of every job succeed.

    Args:
        plane: where.
        namespace: the jobs', each of one pod.
        recorded: wait until the FineTuneJobs say so; else, for an operator that writes no status, the PyTorchJobs.

    Returns:
        Seconds from the first pod's end until the end of the last job is recorded.

    Raises:
        LoadError: something did not happen.
    """
    return asyncio.run(_let_succeed(plane, namespace, JOBS if recorded else PYTORCH_JOBS))


def let_run(plane: ControlPlane, namespace: str) -> None:
    """Let the pods of every job run.

    Raises:
        LoadError: something did not happen.
    """
    asyncio.run(_let_run(plane, namespace))


async def _let_run(plane: ControlPlane, namespace: str) -> None:
    async with connect(plane) as client:
        count = len((await client.list(PYTORCH_JOBS.format(namespace)))["items"])
        pods = await _until(client, PODS.format(namespace), count, bool)
        await in_parallel(
            client.merge(f"{PODS.format(namespace)}/{pod['metadata']['name']}/status", {"status": _running(pod)})
            for pod in pods
        )
        await _until(
            client, JOBS.format(namespace), count, lambda job: (job.get("status") or {}).get("phase") == "Preparing"
        )


async def _let_succeed(plane: ControlPlane, namespace: str, recorded_in: str) -> float:
    async with connect(plane) as client:
        count = len((await client.list(PYTORCH_JOBS.format(namespace)))["items"])
        pods = await _until(client, PODS.format(namespace), count, bool)
        begin = time.monotonic()
        await in_parallel(
            client.merge(f"{PODS.format(namespace)}/{pod['metadata']['name']}/status", {"status": _succeeded(pod)})
            for pod in pods
        )
        await _until(client, recorded_in.format(namespace), count, lambda job: has_condition(job, "Succeeded"))
        return time.monotonic() - begin


async def _until(client: Client, path: str, count: int, condition: Callable[[Object], bool]) -> list[Object]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    found: list[Object] = []
    while time.monotonic() < deadline:
        found = [item for item in (await client.list(path))["items"] if condition(item)]
        if len(found) == count:
            return found
        await asyncio.sleep(POLL_SECONDS)
    raise LoadError(f"{path}: only {len(found)} of {count} came about.")


def _succeeded(pod: Object) -> Object:
    now = _now()
    ended = {"exitCode": 0, "reason": "Completed", "startedAt": now, "finishedAt": now, "message": success()}
    return _status(pod, "Succeeded", {"terminated": ended})


def _running(pod: Object) -> Object:
    return _status(pod, "Running", {"running": {"startedAt": _now()}})


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _status(pod: Object, phase: str, state: Object) -> Object:
    containers = [
        {
            "name": container["name"],
            "image": container["image"],
            "imageID": "",
            "restartCount": 0,
            "ready": False,
            "state": state,
        }
        for container in pod["spec"]["containers"]
    ]
    return {"phase": phase, "containerStatuses": containers}
