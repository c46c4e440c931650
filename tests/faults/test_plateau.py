"""Nothing of a job outlives it: after thousands that came, succeeded and went, a process keeps what it kept before."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.cluster.api import Api, Object, has_condition, wait_until
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import manifest, success
from tests.faults import counted_operator
from tests.faults.counted_operator import Count, read_counts
from tests.faults.fault_table import ALL_FAULTS

WAVES, JOBS = (10, 500) if ALL_FAULTS else (2, 40)
WAVE_SECONDS = 600
RESIDENT_MIB = 6
"""What memory may differ by between two moments at which the same is kept: the allocator keeps some pages for later."""
SPARE_OBJECTS = 500
"""Objects of any class, such as those of connections, that may be more at one moment than at another."""


def test_what_a_process_keeps_does_not_grow_with_the_jobs_that_were(
    control_plane: ControlPlane, shared_operator: OperatorProcess, api: Api, kubelet: Kubelet, tmp_path: Path
) -> None:
    shared_operator.stop()
    file = tmp_path / "counts.jsonl"
    operator = OperatorProcess(
        control_plane,
        tmp_path,
        {"watch_namespaces": [api.namespace], "resync_seconds": 2},
        command=(sys.executable, "-P", counted_operator.__file__, str(file)),
    )
    operator.start()
    try:
        wave(api, kubelet, 0)  # what is made once is made by then
        counts = [counted(operator, file)]
        for number in range(1, WAVES):
            wave(api, kubelet, number)
            counts.append(counted(operator, file))
    finally:
        operator.stop()
    first, last = counts[0], counts[-1]
    more = {name: number - first.objects.get(name, 0) for name, number in last.objects.items()}
    print(*counts, sep="\n")
    # A leak is one of each job; the queue keeps a few void timers.
    assert {name: number for name, number in more.items() if number > JOBS // 10} == {}
    assert last.tasks == first.tasks
    assert last.files <= first.files + 2  # connections that wait for their next request
    assert last.everything - first.everything < SPARE_OBJECTS
    assert last.resident_mib - first.resident_mib < RESIDENT_MIB


def wave(api: Api, kubelet: Kubelet, number: int) -> None:
    """Jobs are created, succeed, and are deleted, with all that was made for them."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: api.create(manifest(f"wave-{number}-{one}")), range(JOBS)))
        pods = wait_until(lambda: living(api), lambda found: len(found) == JOBS, WAVE_SECONDS)
        list(pool.map(lambda pod: kubelet.succeed(pod, success()), pods))
        wait_until(
            lambda: api.list("FineTuneJob"),
            lambda found: all(has_condition(job, "Succeeded") for job in found),
            WAVE_SECONDS,
        )
        list(pool.map(lambda one: api.delete("FineTuneJob", f"wave-{number}-{one}"), range(JOBS)))
    for kind in ("FineTuneJob", "PyTorchJob", "Pod"):
        wait_until(partial(api.list, kind), lambda found: not found, WAVE_SECONDS)


def living(api: Api) -> list[Object]:
    """Pods that nobody has deleted."""
    return [pod for pod in api.list("Pod") if "deletionTimestamp" not in pod["metadata"]]


def counted(operator: OperatorProcess, file: Path) -> Count:
    """How much the operator keeps once it has heard of everything."""
    before = operator.control_plane.audit.position()

    def resyncs() -> int:
        return sum((found.verb, found.resource) == ("list", "pods") for found in operator.requests(before))

    wait_until(resyncs, lambda number: number >= 3)
    told = len(read_counts(file))
    os.kill(operator.server.pid, signal.SIGUSR1)
    return wait_until(lambda: read_counts(file), lambda found: len(found) > told)[-1]
