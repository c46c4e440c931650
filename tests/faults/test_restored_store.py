"""An etcd that is restored from a backup under a running operator: versions go back, and what was known is not so.

On a control plane of its own, since its store is stopped, and only where every fault is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.api import wait_until
from tests.cluster.conftest import empty_namespace
from tests.cluster.control_plane import ControlPlane, run_control_plane
from tests.cluster.kubelet import Kubelet, Reaper
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, success
from tests.faults.fault_table import ALL_FAULTS

pytestmark = pytest.mark.skipif(not ALL_FAULTS, reason="needs a control plane of its own: FAULTS=all")


@contextmanager
def store_at_rest(plane: ControlPlane) -> Iterator[Path]:
    """The folder of etcd, while neither it nor anything above it runs."""
    for server in reversed(plane.servers):
        server.stop()
    yield plane.folder / "etcd"
    for server in plane.servers:
        server.start()


def test_after_a_restore_the_operator_begins_anew_and_brings_every_job_to_its_end(tmp_path: Path) -> None:
    with run_control_plane(tmp_path / "plane") as plane, empty_namespace(plane) as api:
        operator = OperatorProcess(plane, tmp_path / "operator", {"resync_seconds": 1})
        reaper = Reaper(plane.api)
        reaper.start()
        kubelet = Kubelet(api, reaper)
        runs, later = Scene(api, kubelet, "runs"), Scene(api, kubelet, "later")
        operator.start()
        runs.apply()
        runs.run()
        with store_at_rest(plane) as store:
            shutil.copytree(store, tmp_path / "backup")
        kubelet.succeed(runs.pods()[0], success())
        runs.wait_phase("Succeeded")
        later.apply()
        later.run()

        with store_at_rest(plane) as store:
            shutil.rmtree(store)
            shutil.copytree(tmp_path / "backup", store)
        # As a kubelet does.
        wait_until(lambda: operator.running, lambda running: not running, 60)
        assert operator.server.exit_code == 1
        assert "restored from a backup" in operator.log().splitlines()[-1]
        operator.start()
        kubelet.succeed(runs.pods()[0], success())
        runs.wait_phase("Succeeded")
        assert [job["metadata"]["name"] for job in api.list("FineTuneJob")] == ["runs"]
        reaper.stop()
        operator.stop()
