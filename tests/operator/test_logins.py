"""A token that is refused or cannot be read is an API server that does not answer: the operator waits, and goes on.

Kubelets replace tokens every hour, and an API server may refuse them for a while after its own restart.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException
from kubernetes.aio.config.incluster_config import InClusterConfigLoader

from finetune_operator.cluster import Cluster
from finetune_operator.errors import Unavailable
from finetune_operator.handlers import watch
from finetune_operator.kopf_defences import BACKOFF_LIMIT_SECONDS, LoginPace
from finetune_operator.wire import Wire
from tests.operator.jumping_loop import JumpingLoop
from tests.operator.loopback import answering


def logins(*after: float) -> list[float]:
    """When logins are let through that are wanted so long after the one before (seconds)."""

    async def run() -> list[float]:
        pace, times = LoginPace(), []
        for seconds in after:
            await asyncio.sleep(seconds)
            await pace.keep()
            times.append(asyncio.get_running_loop().time())
        return times

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(run())


def test_logins_that_follow_each_other_wait_longer_and_longer() -> None:
    assert logins(*[0] * 8) == [0, 1, 3, 7, 15, 31, 31 + BACKOFF_LIMIT_SECONDS, 31 + 2 * BACKOFF_LIMIT_SECONDS]
    assert logins(*[2] * 4) == [2, 5, 9, 15]


def test_a_login_that_has_lasted_is_followed_by_one_that_waits_for_nothing() -> None:
    assert logins(0, 0, 0, 1800, 3600) == [0, 1, 3, 1803, 5403]


def watched(serve: Callable[[web.Request], Awaitable[web.StreamResponse]], seconds: float, refresh: Any = None) -> None:
    """Watch an API server that answers so."""

    async def run() -> None:
        async with answering(serve) as url:
            configuration = Configuration(host=url)
            async with Cluster(Wire(configuration)) as cluster:
                configuration.refresh_api_key_hook = refresh
                stop = asyncio.Event()
                asyncio.get_running_loop().call_later(seconds, stop.set)
                await watch(
                    cluster,
                    lambda *_: None,
                    (),
                    stop,
                    tells=lambda *_: None,
                    begun=lambda *_: None,
                    lists_again=lambda: None,
                )

    asyncio.run(run())


@pytest.mark.parametrize("body", [b'{"kind":"Status","code":401,"message":"Unauthorized"}', b"Unauthorized\n", b""])
def test_an_api_server_that_refuses_the_token_is_not_asked_hundreds_of_times(body: bytes) -> None:
    asked: Counter[str] = Counter()

    async def serve(request: web.Request) -> web.StreamResponse:
        asked[request.path] += 1
        return web.Response(status=401, body=body)

    watched(serve, 2.0)
    assert 1 < asked["/apis"] < 4


def test_a_login_without_a_token_is_tried_again_soon() -> None:
    since = time.monotonic()
    asked: Counter[str] = Counter()

    async def serve(request: web.Request) -> web.StreamResponse:
        asked[request.path] += 1
        return web.json_response({"versions": [], "groups": []})

    def refresh(_: Configuration) -> None:
        if time.monotonic() < since + 0.5:
            raise ConfigException("Token file exists but empty.")

    watched(serve, 3.0, refresh)
    assert asked["/apis"] == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None], ids=["empty", "no text", "missing"])
def test_a_token_that_cannot_be_read_is_an_api_server_without_an_answer(tmp_path: Path, content: bytes | None) -> None:
    token, certificate = tmp_path / "token", tmp_path / "ca.crt"
    token.write_text("first")
    certificate.write_text("certificate")
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
    loader: Any = InClusterConfigLoader(str(token), str(certificate), environ=environ)  # type: ignore[no-untyped-call]
    configuration = Configuration()
    loader.load_and_set(configuration)
    configuration.ssl_ca_cert = None
    if content is None:
        token.unlink()
    else:
        token.write_bytes(content)
    loader.token_expires_at = loader.token_expires_at.replace(year=2000)

    async def ask() -> None:
        async with Cluster(Wire(configuration)) as cluster:
            await cluster.get_job("team", "guard")

    with pytest.raises(Unavailable, match="token for the API server cannot be read") as caught:
        asyncio.run(ask())
    assert caught.value.status is None


def test_an_operator_without_a_cluster_ends_with_one_sentence(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KUBE")}
    ended = subprocess.run(
        [sys.executable, "-m", "finetune_operator"],
        env={**environ, "KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("The operator cannot run: No API server is known")
    assert "Traceback" not in ended.stderr
