"""Fixtures of the tests against a real server: adapters trained once, one server per base model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.cases import CASES
from tests.serving.environment import vllm_version
from tests.serving.results import Results
from tests.serving.served import Served, Servers

_RESULTS = pytest.StashKey[Results]()
_WRITE = "--write-serving-results"
_BASES = list(dict.fromkeys(case.base for case in CASES))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the table goes."""
    parser.addoption(_WRITE, metavar="FILE", help="write the table of what a real server was measured to do")


def pytest_configure(config: pytest.Config) -> None:
    """A table for the session."""
    config.stash[_RESULTS] = Results()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `served` runs for every adapter, unless it names some."""
    named = any("served" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "served" in metafunc.fixturenames and not named:
        metafunc.parametrize("served", CASES, ids=lambda case: case.name, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of a base model one after another, so that its server starts once; the page last."""

    def place(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        case = callspec.params.get("served") if callspec else None
        if case is not None:
            return _BASES.index(case.base)
        return len(_BASES) + ("results" in item.name)

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, and the page where it was asked for and everything was measured."""
    results = config.stash[_RESULTS]
    if not results.cells:
        return
    page = results.markdown(vllm_version())
    terminalreporter.section("served by a real vLLM")
    terminalreporter.write_line(page)
    target = config.getoption(_WRITE)
    if target and results.complete:
        Path(target).write_text(page, encoding="utf-8")


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Results:
    """What is found goes here."""
    return pytestconfig.stash[_RESULTS]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers by base model, none of which outlives the session."""
    found = Servers(tmp_path_factory.mktemp("serving"))
    yield found
    found.stop()


@pytest.fixture
def served(request: pytest.FixtureRequest, servers: Servers) -> Served:
    """The adapter of a case at its server."""
    return servers.serving(request.param)
