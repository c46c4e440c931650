"""Fixtures that more than one part of the tests uses, the order of the tests, and failures shown as they happen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_server import Hub, run_hub
from tests.s3_server import S3Server, isolate_aws, run_s3_server
from tests.tools.build import binary

OPERATORS = ("operator_factory", "operator", "unlucky")
"""Fixtures with an operator: the test's own, the shared one, the one behind a proxy."""


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole session; tests keep apart by buckets of their own."""
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server as the code under test finds it: through its environment, and nothing else of the user's."""
    isolate_aws(monkeypatch)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub that HF_ENDPOINT names, with a cache of its own and nobody logged in."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # The library has read its variables already; processes that a test starts have not.
    for name, value in (("HF_HUB_CACHE", tmp_path / "hub-cache"), ("HF_TOKEN_PATH", tmp_path / "no-token")):
        monkeypatch.setattr(constants, name, str(value))
        monkeypatch.setenv(name, str(value))
    with run_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server
        huggingface_hub.close_session()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_FailuresAtOnce(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests run a program of tests/tools come last: on a new machine it is still being built.

    Within a folder, tests that share an operator stand together: each of the others would stop it, and the next start
    it anew.
    """
    last = {item.path for item in items if _runs_a_tool(item)}
    folders = list(dict.fromkeys(item.path.parent for item in items))
    items.sort(key=lambda item: (item.path in last, folders.index(item.path.parent), _operator(item)))


def _operator(item: pytest.Item) -> int:
    names = getattr(item, "fixturenames", ())
    return next((place for place, name in enumerate(OPERATORS, 1) if name in names), 0)


def _runs_a_tool(item: pytest.Item) -> bool:
    names = vars(getattr(item, "module", item)).values()
    return "s3_server" in getattr(item, "fixturenames", ()) or any(value is binary for value in names)


class _FailuresAtOnce:
    """Shows a failure when it happens; after the last test it is only named."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._show(report, f"{report.nodeid} ({report.when})")

    @pytest.hookimpl(trylast=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._show(report, report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._config.option.tbstyle = "no"

    def _show(self, report: pytest.TestReport | pytest.CollectReport, title: str) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if not report.failed or reporter is None or self._config.option.tbstyle == "no":
            return
        writer = self._config.get_terminal_writer()
        reporter.ensure_newline()
        if writer.width_of_current_line:
            writer.line()
        reporter.write_sep("_", title, red=True, bold=True)
        report.toterminal(writer)
        for name, content in report.sections:
            reporter.write_sep("-", name)
            reporter.write_line(content.rstrip("\n"))
