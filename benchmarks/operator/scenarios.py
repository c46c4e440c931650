"""What is measured: one function for each situation, each in a namespace of its own that is gone afterwards.

Every function returns figures by their names, units included; two contestants' figures are comparable name by name.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.operator.contestants import OURS, WATCHED, Contestant, running
from benchmarks.operator.load import LoadError, Timeline, run_load
from benchmarks.operator.settle import let_succeed
from benchmarks.operator.usage import Usage, peak_mib, resident_mib, usage
from finetune_operator.names import JOB_UID_LABEL
from tests.cluster.audit import Request
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator_process import OperatorProcess

Figures = dict[str, float]

WARM_UP_SECONDS = 120
LOAD_SECONDS = 900
QUIET_SECONDS = 6.0
"""So long without a write, and the operator counts as done: longer than any of its waits while nothing is wrong."""
QUIET_LIMIT_SECONDS = 300
GONE_SECONDS = 1800
READY_POLL_SECONDS = 0.01


def arrivals(
    plane: ControlPlane, contestant: Contestant, folder: Path, *, count: int, per_second: float | None
) -> Figures:
    """Jobs that come at a rate, or (None) all at once."""
    with _namespace(plane) as namespace, running(plane, contestant, folder) as operator:
        return _arrivals(plane, operator, namespace, count=count, per_second=per_second)


def arrivals_and_restart(
    plane: ControlPlane, contestant: Contestant, folder: Path, *, count: int
) -> tuple[Figures, Figures]:
    """Jobs that come all at once, are let succeed, and are looked at by an operator that starts anew."""
    with _namespace(plane) as namespace:
        with running(plane, contestant, folder) as operator:
            arrived = _arrivals(plane, operator, namespace, count=count, per_second=None)
            finished_seconds = let_succeed(plane, namespace, recorded=contestant.writes_status)
            _wait_quiet(operator)
        arrived["jobs ended at once: until all are recorded (s)"] = finished_seconds
        return arrived, _restart(plane, contestant, folder, namespace)


def among_many(
    plane: ControlPlane, contestant: Contestant, folder: Path, *, count: int, per_second: float, rest_seconds: float
) -> tuple[Figures, Figures]:
    """A start among jobs that have been there for long, a while at rest, and jobs that come at a rate."""
    position, begin = plane.audit.position(), time.monotonic()
    with _namespace(plane) as namespace, running(plane, contestant, folder) as operator:
        figures = {"ready (s)": time.monotonic() - begin}
        _wait_quiet(operator)
        requests = operator.requests(position)
        figures |= {
            "writes of the start": sum(request.writes for request in requests),
            "requests of the start": len(requests),
            "CPU of the start (s)": usage(_pids(plane, operator)).processes["operator"],
            "RSS peak of the start (MiB)": peak_mib(operator.server.pid),
        }
        position, before = plane.audit.position(), usage(_pids(plane, operator))
        time.sleep(rest_seconds)
        rest = operator.requests(position)
        used = usage(_pids(plane, operator)).since(before).processes
        figures |= {
            "at rest: requests per second": len(rest) / rest_seconds,
            "at rest: writes per second": sum(request.writes for request in rest) / rest_seconds,
            "at rest: CPU of the operator (% of one core)": 100 * used["operator"] / rest_seconds,
            "at rest: CPU of kube-apiserver (% of one core)": 100 * used["kube-apiserver"] / rest_seconds,
            "at rest: RSS (MiB)": resident_mib(operator.server.pid),
        }
        return figures, _arrivals(plane, operator, namespace, count=count, per_second=per_second)


def settle_in(plane: ControlPlane, folder: Path) -> None:
    """Let ours write what has become true while nobody looked: of a trainer that reports nothing that it runs."""
    with running(plane, OURS, folder, wait=False) as operator:
        operator.server.wait_ready(LOAD_SECONDS)
        _wait_quiet(operator)


def what_is_there(plane: ControlPlane, namespace: str) -> Figures:
    """Sizes of the objects of one job that runs in a namespace, and what the servers hold because of all of them."""
    objects = {
        "FineTuneJob, with its status": plane.api.list("FineTuneJob", namespace),
        "ConfigMap": plane.api.list("ConfigMap", namespace, labels=JOB_UID_LABEL),
        "PyTorchJob": plane.api.list("PyTorchJob", namespace, labels=JOB_UID_LABEL),
        "pod": plane.api.list("Pod", namespace, labels=JOB_UID_LABEL),
    }
    store = sum(file.stat().st_size for file in (plane.folder / "etcd").rglob("*") if file.is_file())
    return {
        **{f"{name} (kB of JSON)": len(json.dumps(found[0])) / 1000 for name, found in objects.items()},
        **{f"{server.name}: RSS (MiB)": resident_mib(server.pid) for server in plane.servers},
        "etcd: files (MiB)": store / 2**20,
    }


def event_loop(plane: ControlPlane, folder: Path, *, count: int, per_second: float) -> Figures:
    """What keeps our event loop, on which everything waits, through a start and jobs that come at a rate."""
    with _namespace(plane) as namespace, running(plane, WATCHED, folder) as operator:
        _wait_quiet(operator)
        names = [f"job-{number:05}" for number in range(count)]
        asyncio.run(run_load(plane, namespace, names, per_second=per_second, timeout_seconds=LOAD_SECONDS))
        _wait_quiet(operator)
    blocked = operator.blocked()
    return {
        "callbacks of more than 50 ms of CPU": len(blocked),
        "the longest of them (ms of CPU)": 1000 * max((found.seconds for found in blocked), default=0),
    }


def _arrivals(
    plane: ControlPlane, operator: OperatorProcess, namespace: str, *, count: int, per_second: float | None
) -> Figures:
    names = [f"job-{number:05}" for number in range(count)]
    asyncio.run(run_load(plane, namespace, ["warm-up"], per_second=None, timeout_seconds=WARM_UP_SECONDS))
    _wait_quiet(operator)
    position, pids = plane.audit.position(), _pids(plane, operator)
    resident, begin, before = resident_mib(operator.server.pid), time.monotonic(), usage(pids)
    timeline = asyncio.run(run_load(plane, namespace, names, per_second=per_second, timeout_seconds=LOAD_SECONDS))
    wall_seconds, drained = time.monotonic() - begin, usage(pids).since(before)
    drained_requests = operator.requests(position)
    _wait_quiet(operator)
    requests = operator.requests(position)
    return {
        **_times(timeline, at_once=per_second is None),
        "operator: RSS before (MiB)": resident,
        "operator: RSS peak (MiB)": peak_mib(operator.server.pid),
        "operator: RSS after (MiB)": resident_mib(operator.server.pid),
        **_cpu(drained, wall_seconds, per_job=count),
        "operator: CPU per job until quiet (ms)": 1000 * usage(pids).since(before).processes["operator"] / count,
        **_counts(drained_requests, count, "until the last PyTorchJob"),
        **_counts(requests, count, "until quiet"),
    }


def _restart(plane: ControlPlane, contestant: Contestant, folder: Path, namespace: str) -> Figures:
    position, begin = plane.audit.position(), time.monotonic()
    with running(plane, contestant, folder) as operator:
        figures = {"ready (s)": time.monotonic() - begin}
        _wait_quiet(operator)
        requests = operator.requests(position)
        figures |= {
            "writes": sum(request.writes for request in requests),
            "requests": len(requests),
            "operator: CPU (s)": usage(_pids(plane, operator)).processes["operator"],
            "operator: RSS peak (MiB)": peak_mib(operator.server.pid),
            "operator: RSS after (MiB)": resident_mib(operator.server.pid),
        }
    return figures | {
        "start until a new job has its PyTorchJob (s)": _first_reaction(plane, contestant, folder, namespace)
    }


def _first_reaction(plane: ControlPlane, contestant: Contestant, folder: Path, namespace: str) -> float:
    """Seconds from the start of the process, with a job waiting, to that job's PyTorchJob."""

    with running(plane, contestant, folder, wait=False):
        begin = time.monotonic()
        load = run_load(plane, namespace, ["newcomer"], per_second=None, timeout_seconds=WARM_UP_SECONDS)
        return asyncio.run(load).child_seen["newcomer"] - begin


def _times(timeline: Timeline, *, at_once: bool) -> Figures:
    latencies = sorted(1000 * seconds for seconds in timeline.latencies())
    figures = {f"p{percent} (ms)": _percentile(latencies, percent) for percent in (50, 90, 99)}
    figures |= {"max (ms)": latencies[-1]}
    if at_once:
        figures |= {
            "creating the FineTuneJobs (s)": timeline.create_seconds,
            "drained: first creation until last PyTorchJob (s)": timeline.drain_seconds,
            "of which after the last creation (s)": timeline.lag_seconds,
        }
    return figures


def _percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest rank: a value that was measured."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _cpu(used: Usage, wall_seconds: float, *, per_job: int) -> Figures:
    cores = os.cpu_count() or 1
    figures = {f"{name}: CPU (s)": seconds for name, seconds in used.processes.items()}
    return {
        **figures,
        "everything else on the machine: CPU (s)": used.others,
        "machine busy (%)": 100 * used.machine / (wall_seconds * cores),
        "kube-apiserver: share of the machine (%)": 100 * used.processes["kube-apiserver"] / (wall_seconds * cores),
        "operator: CPU per job (ms)": 1000 * used.processes["operator"] / per_job,
    }


def _counts(requests: Sequence[Request], count: int, until: str) -> Figures:
    return {
        f"requests per job, {until}": len(requests) / count,
        f"writes per job, {until}": sum(request.writes for request in requests) / count,
    }


def kinds_of_requests(requests: Sequence[Request], count: int) -> list[tuple[str, float]]:
    """Requests per job, by verb and resource, the most frequent first."""
    return [(f"{verb} {resource}", number / count) for (verb, resource), number in _tally(requests).most_common()]


def _tally(requests: Sequence[Request]) -> Counter[tuple[str, str]]:
    return Counter((request.verb, request.resource) for request in requests)


def _pids(plane: ControlPlane, operator: OperatorProcess) -> dict[str, int]:
    servers = {server.name: server.pid for server in plane.servers}
    return {"operator": operator.server.pid, **servers, "this benchmark": os.getpid()}


def _wait_quiet(operator: OperatorProcess) -> None:
    """Return once the operator has not written for a while.

    Raises:
        LoadError: it goes on and on.
    """
    audit = operator.control_plane.audit
    position, last_write = audit.position(), time.monotonic()
    deadline = last_write + QUIET_LIMIT_SECONDS
    while time.monotonic() < last_write + QUIET_SECONDS:
        time.sleep(0.5)
        end = audit.position()
        if operator.writes(position):
            last_write = time.monotonic()
        position = end
        if time.monotonic() > deadline:
            raise LoadError(f"The operator still writes after {QUIET_LIMIT_SECONDS} s; see {operator.server.log}")


@contextmanager
def _namespace(plane: ControlPlane) -> Iterator[str]:
    """An empty namespace, as strict as the tests', gone with everything in it afterwards."""
    name = f"bench-{secrets.token_hex(4)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api = plane.api
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    api.wait("ServiceAccount", "default", bool, namespace=name)
    yield name
    api.delete("Namespace", name)
    api.wait_gone("Namespace", name, GONE_SECONDS)
