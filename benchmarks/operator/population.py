"""Fills a control plane with jobs that have been there for long: most of them finished, some of them running.

Twenty thousand whole lives would take the training operator hours. So a few are lived, by the operator itself, and
what it left of one that succeeded (job, status, PyTorchJob) is copied under other names. Ended pods are not copied: a
cluster's garbage collection takes them away by their number.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.operator.contestants import OURS, running
from benchmarks.operator.load import JOBS, PYTORCH_JOBS, Client, connect, in_parallel, run_load
from benchmarks.operator.settle import let_run, let_succeed
from finetune_operator.names import JOB_NAME_LABEL, JOB_UID_LABEL, child_name
from tests.cluster.control_plane import ControlPlane

SEED = "seed"
LIVES_SECONDS = 1800
SEEN = {"past": "true"}
"""Labels by which the naive operator is told that somebody has dealt with a job."""

Object = dict[str, Any]


def populate(plane: ControlPlane, folder: Path, namespaces: tuple[str, str], *, finished: int, alive: int) -> None:
    """Make jobs.

    Args:
        plane: where.
        folder: takes the operator's log.
        namespaces: of the finished jobs, and of those that run.
        finished: how many have succeeded.
        alive: how many have a pod that runs.
    """
    past, present = namespaces
    with running(plane, OURS, folder):
        names = [f"alive-{number:05}" for number in range(alive)]
        asyncio.run(run_load(plane, past, [SEED], per_second=None, timeout_seconds=LIVES_SECONDS))
        let_succeed(plane, past, recorded=True)
        asyncio.run(run_load(plane, present, names, per_second=None, timeout_seconds=LIVES_SECONDS))
        let_run(plane, present)
        for name in names:
            plane.api.patch("FineTuneJob", name, {"metadata": {"labels": SEEN}}, namespace=present)
    with _without_training_operator(plane):
        asyncio.run(_copy(plane, past, finished - 1))


async def _copy(plane: ControlPlane, namespace: str, count: int) -> None:
    async with connect(plane) as client:
        (job,) = (await client.list(JOBS.format(namespace)))["items"]
        (child,) = (await client.list(PYTORCH_JOBS.format(namespace)))["items"]
        await in_parallel(_copy_one(client, namespace, job, child, f"past-{number:05}") for number in range(count))


async def _copy_one(client: Client, namespace: str, job: Object, child: Object, name: str) -> None:
    described = {"name": name, "labels": SEEN}
    made = await client.post(JOBS.format(namespace), {**_kind(job), "metadata": described, "spec": job["spec"]})
    uid = made["metadata"]["uid"]
    await client.merge(f"{JOBS.format(namespace)}/{name}/status", {"status": job["status"]})
    owner = {**child["metadata"]["ownerReferences"][0], "name": name, "uid": uid}
    metadata: Object = copy.deepcopy({key: child["metadata"][key] for key in ("labels", "annotations")})
    metadata["labels"] |= {JOB_NAME_LABEL: name, JOB_UID_LABEL: uid}
    metadata |= {"name": child_name(name, uid, 1), "ownerReferences": [owner]}
    path = PYTORCH_JOBS.format(namespace)
    await client.post(path, {**_kind(child), "metadata": metadata, "spec": child["spec"]})
    await client.merge(f"{path}/{metadata['name']}/status", {"status": child["status"]})


def _kind(raw: Object) -> Object:
    return {key: raw[key] for key in ("apiVersion", "kind")}


@contextmanager
def _without_training_operator(plane: ControlPlane) -> Iterator[None]:
    """It would look at every copy, and its webhook be asked about each."""
    configuration = "ValidatingWebhookConfiguration"
    (webhooks,) = [found for found in plane.api.list(configuration) if "training-operator" in found["metadata"]["name"]]
    with plane.training_operator.stopped():
        plane.api.delete(configuration, webhooks["metadata"]["name"])
        yield
    metadata = {"name": webhooks["metadata"]["name"]}
    plane.api.create({**_kind(webhooks), "metadata": metadata, "webhooks": webhooks["webhooks"]})
