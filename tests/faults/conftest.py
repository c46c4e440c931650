"""What the tests of the cluster have, and an operator behind a proxy that loses, delays, garbles and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.api import Api
from tests.cluster.conftest import (
    api,
    check_loop,
    control_plane,
    kubelet,
    namespace,
    operator,
    operator_factory,
    pytest_runtest_call,
    pytest_runtest_makereport,
    reaper,
    reporter,
    shared_operator,
)
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import WATCHED_COMMAND, OperatorProcess
from tests.faults.fault_proxy import FaultProxy, run_fault_proxy
from tests.faults.fault_table import ALL_FAULTS, FaultTable
from tests.faults.history import watching
from tests.faults.stage import Stage
from tests.faults.theatre import Life, Theatre

__all__ = [
    "api",
    "control_plane",
    "kubelet",
    "namespace",
    "operator",
    "operator_factory",
    "pytest_runtest_call",
    "pytest_runtest_makereport",
    "reaper",
    "reporter",
    "shared_operator",
]

_TABLE = pytest.StashKey[FaultTable]()
_LIVES = pytest.StashKey[dict[str, Life]]()


@dataclass(frozen=True)
class UnluckyOperator:
    """An operator and what stands between it and the API server."""

    process: OperatorProcess
    proxy: FaultProxy


@pytest.fixture(scope="module")
def shared_unlucky_operator(
    control_plane: ControlPlane, shared_operator: OperatorProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[UnluckyOperator]:
    """The operator behind a proxy that the tests of a module share. No test of that module takes another one."""
    shared_operator.stop()
    folder = tmp_path_factory.mktemp("unlucky")
    with run_fault_proxy(control_plane, folder) as proxy:
        process = OperatorProcess(control_plane, folder, {"concurrency": 64}, server=proxy.url, command=WATCHED_COMMAND)
        yield UnluckyOperator(process, proxy)
        process.stop()


@pytest.fixture
def unlucky(shared_unlucky_operator: UnluckyOperator) -> Iterator[UnluckyOperator]:
    """A running operator for all namespaces, behind a proxy that makes things go wrong; the test may kill it."""
    process, proxy = shared_unlucky_operator.process, shared_unlucky_operator.proxy
    log_start, blocked_since = process.server.log_size(), process.blocked_size()
    proxy.calm()
    process.start()
    yield shared_unlucky_operator
    proxy.calm()
    print(process.log(log_start))
    check_loop(process, blocked_since)


@pytest.fixture
def stage(api: Api, kubelet: Kubelet) -> Iterator[Stage]:
    """Where many jobs live at the same time."""
    with watching(api) as history:
        yield Stage(kubelet, api, history)


@pytest.fixture
def theatre(unlucky: UnluckyOperator, stage: Stage, request: pytest.FixtureRequest) -> Theatre:
    """Jobs that are compared with those that nothing happens to."""
    table, lives = request.config.stash.setdefault(_TABLE, FaultTable()), request.config.stash.setdefault(_LIVES, {})
    return Theatre(stage, unlucky.process, unlucky.proxy, table, lives)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Where every fault was asked for, what became of each."""
    if ALL_FAULTS:
        terminalreporter.section("faults")
        for line in config.stash.setdefault(_TABLE, FaultTable()).lines():
            terminalreporter.write_line(line)
