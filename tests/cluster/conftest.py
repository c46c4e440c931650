"""Fixtures of the tests on a real control plane: one for the session, a namespace for each test.

`operator` is one process that all tests share, which is what makes them fast. A test that needs settings of its own,
or kills it, takes `operator_factory`: the shared one is stopped meanwhile, since two would do the same work twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.api import Api
from tests.cluster.control_plane import OPERATOR_ACCOUNT, ControlPlane, run_control_plane
from tests.cluster.kubelet import Kubelet, Reaper
from tests.cluster.operator_process import WATCHED_COMMAND, OperatorProcess
from tests.cluster.reporter import Reporter
from tests.cluster.watched_operator import LIMIT_SECONDS
from tests.machine_pauses import Pauses

LOG_LINES = 150
"""How much of an operator's log a failed test shows."""

OperatorFactory = Callable[..., OperatorProcess]


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A real control plane with the training operator; see its own description."""
    with run_control_plane(tmp_path_factory.mktemp("cluster")) as plane:
        yield plane


@contextmanager
def empty_namespace(control_plane: ControlPlane) -> Iterator[Api]:
    """A namespace under the restricted Pod Security Standard. Its deletion is asked for and not waited for."""
    name = f"test-{secrets.token_hex(4)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api = control_plane.api
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    # No pod is admitted before the namespace has it.
    api.wait("ServiceAccount", "default", lambda found: True, namespace=name)
    yield api.in_namespace(name)
    api.delete("Namespace", name)


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """An empty namespace."""
    with empty_namespace(control_plane) as api:
        yield str(api.namespace)


@pytest.fixture
def api(control_plane: ControlPlane, namespace: str) -> Api:
    """The API server as an administrator sees it, in the test's namespace."""
    return control_plane.api.in_namespace(namespace)


@pytest.fixture(scope="session")
def reaper(control_plane: ControlPlane) -> Iterator[Reaper]:
    """The node that pods are bound to, and the confirmation of their deletion."""
    reaper = Reaper(control_plane.api)
    reaper.start()
    yield reaper
    reaper.stop()


@pytest.fixture
def kubelet(api: Api, reaper: Reaper) -> Kubelet:
    """What happens to the pods of the test's namespace."""
    return Kubelet(api, reaper)


@pytest.fixture(scope="session")
def shared_operator(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The operator that tests share; it runs whenever a test asks for `operator`."""
    process = OperatorProcess(control_plane, tmp_path_factory.mktemp("operator"), command=WATCHED_COMMAND)
    yield process
    process.stop()


@pytest.fixture
def operator(shared_operator: OperatorProcess) -> Iterator[OperatorProcess]:
    """A running operator that looks after all namespaces. Not to be stopped: that is what `operator_factory` is for."""
    since, blocked_since = shared_operator.control_plane.audit.position(), shared_operator.blocked_size()
    shared_operator.start()
    yield shared_operator
    assert shared_operator.running, f"The operator ended by itself; {shared_operator.server.log} says why."
    check_rights(shared_operator, since)
    check_loop(shared_operator, blocked_since)


@pytest.fixture
def reporter(control_plane: ControlPlane, operator: OperatorProcess, api: Api, tmp_path: Path) -> Reporter:
    """Posts progress to the shared operator as pods of the test's namespace do."""
    return Reporter(control_plane, operator, api, tmp_path)


@pytest.fixture
def operator_factory(
    request: pytest.FixtureRequest,
    control_plane: ControlPlane,
    shared_operator: OperatorProcess,
    namespace: str,
    tmp_path: Path,
) -> Iterator[OperatorFactory]:
    """Makes operators of the test's own, not started, for its namespace: `operator_factory(retry_base_seconds=60)`.

    Keywords are settings. `account` is another service account of the operator's namespace than the usual one,
    `server` the URL of a proxy before the API server.
    """
    if "operator" in request.fixturenames:
        raise pytest.UsageError("A test takes either the shared operator or makes its own.")
    shared_operator.stop()
    made: list[OperatorProcess] = []

    def make(*, account: str = OPERATOR_ACCOUNT, server: str | None = None, **settings: Any) -> OperatorProcess:
        folder = tmp_path / f"operator-{len(made)}"
        settings = {"watch_namespaces": [namespace], **settings}
        process = OperatorProcess(
            control_plane, folder, settings, account=account, server=server, command=WATCHED_COMMAND
        )
        made.append(process)
        return process

    request.node.stash[_MADE] = made
    yield make
    for process in made:
        process.stop()
    for process in made:
        check_rights(process)
        check_loop(process)


PAUSES = Pauses()
PAUSES.start()

_MADE = pytest.StashKey[list[OperatorProcess]]()
_LOG_START = pytest.StashKey[int]()


def check_rights(process: OperatorProcess, since: int | None = None) -> None:
    """The permissions that we publish are enough."""
    forbidden = process.forbidden(since)
    assert not forbidden, "The operator asked for what its role does not allow:\n" + "\n".join(forbidden)


def check_loop(process: OperatorProcess, since: int = 0) -> None:
    """Nothing kept the event loop, on which everything waits, but a machine that stood still."""
    blocked = [
        one
        for one in process.blocked(since)
        if one.seconds - PAUSES.within(one.ended - one.seconds, one.ended) > LIMIT_SECONDS
    ]
    assert not blocked, "\n".join(str(one) for one in blocked)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Remember where the shared operator's log was when the test began."""
    shared = _shared(item)
    item.stash[_LOG_START] = shared.server.log_size() if shared else 0
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what its operators said, and where the logs of the control plane are."""
    report = yield
    if report.failed:
        shared = _shared(item)
        if shared:
            report.sections.append(("operator's log", shared.server.log_tail(LOG_LINES, item.stash.get(_LOG_START, 0))))
        for process in item.stash.get(_MADE, []):
            report.sections.append((f"log of {process.server.log.parent.name}", process.server.log_tail(LOG_LINES)))
        plane = getattr(item, "funcargs", {}).get("control_plane")
        if isinstance(plane, ControlPlane):
            report.sections.append(("control plane", f"Its logs are in {plane.logs}"))
    return report


def _shared(item: pytest.Item) -> OperatorProcess | None:
    found = getattr(item, "funcargs", {}).get("operator")
    return found if isinstance(found, OperatorProcess) else None
