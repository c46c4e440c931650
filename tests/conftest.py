"""Fixtures that more than one part of the tests uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_server import Hub, run_hub
from tests.s3_server import S3Server, isolate_aws, run_s3_server


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
