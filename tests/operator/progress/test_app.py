"""The progress endpoint lets in the right reports, says no to everything else and keeps tokens to itself."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import KubeflowCallback

from finetune_api.outcome import PROGRESS_BODY_LIMIT_BYTES, TrainerStatus
from finetune_operator.progress.app import progress_app
from finetune_operator.progress.refusals import MayNotReport, TryAgain
from tests.progress_receiver import run_receiver

REPORT = {
    "trainerStatus": {
        "progressPercentage": 12,
        "estimatedRemainingSeconds": 90,
        "metrics": [{"name": "loss", "value": "1.5"}],
        "lastUpdatedTime": "2030-01-02T03:04:05+00:00",
    }
}
GOOD = {"Authorization": "Bearer right"}
SECRET = "s3cr3t-token"


async def authorize(token: str) -> str | None:
    """Knows one token, forbids another, cannot check a third."""
    if token == "foreign":
        raise MayNotReport("This pod belongs to an earlier attempt.")
    if token == "early":
        raise TryAgain("The operator has not looked at this job yet.")
    if token == SECRET:
        raise ConnectionError(f"cannot review {token}")
    if token == "slow":
        await asyncio.Event().wait()
    return "team-a/guard" if token == "right" else None


def serve(
    use: Callable[[TestClient[Any, Any]], Awaitable[None]],
    **timeouts: float,
) -> list[tuple[str, TrainerStatus]]:
    """Run `use` against a server; returns what was delivered."""
    delivered: list[tuple[str, TrainerStatus]] = []

    async def run() -> None:
        app = progress_app(authorize, lambda key, status: delivered.append((key, status)), **timeouts)
        async with TestClient(TestServer(app)) as client:
            await use(client)

    asyncio.run(run())
    return delivered


async def status_and_error(response: ClientResponse) -> tuple[int, str]:
    return response.status, (await response.json())["error"]


@pytest.mark.parametrize("path", ["/", "/any/path", "/apis/v1/namespaces/other/jobs/other"])
def test_a_report_is_delivered_under_the_key_of_its_token_whatever_the_path(path: str) -> None:
    async def use(client: TestClient[Any, Any]) -> None:
        response = await client.post(path, json=REPORT, headers={"authorization": "bearer right"})
        assert (response.status, await response.json()) == (200, {})

    [(key, status)] = serve(use)
    assert key == "team-a/guard"
    assert (status.progress_percentage, status.number("loss")) == (12, 1.5)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Basic right"}, 401),
        ({"Authorization": "right"}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer foreign"}, 403),
        ({"Authorization": f"Bearer {SECRET}"}, 503),
        ({"Authorization": "Bearer slow"}, 503),
    ],
)
def test_whoever_may_not_report_is_told_so_and_nothing_is_delivered(headers: dict[str, str], expected: int) -> None:
    async def use(client: TestClient[Any, Any]) -> None:
        response = await client.post("/", json=REPORT, headers=headers)
        status, error = await status_and_error(response)
        assert status == expected
        assert error.endswith(".")
        assert ("WWW-Authenticate" in response.headers) == (expected == 401)

    assert serve(use, authorize_timeout_seconds=0.05) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"trainerStatus": 1}',
        b'{"trainerStatus": {}}',
        b"[" * 60_000,
        *(
            json.dumps({"trainerStatus": {"lastUpdatedTime": "2030-01-02T03:04:05Z", **fields}}).encode()
            for fields in (
                {"progressPercentage": 101},
                {"progressPercentage": -1},
                {"progressPercentage": "many"},
                {"estimatedRemainingSeconds": -1},
                {"metrics": {"loss": 1}},
                {"metrics": [{"name": "loss"}]},
                {"metrics": [{"name": "x" * 129, "value": "1"}]},
                {"metrics": [{"name": "x", "value": "1"}] * 257},
            )
        ),
    ],
)
def test_a_body_that_is_no_report_is_refused(body: bytes) -> None:
    async def use(client: TestClient[Any, Any]) -> None:
        status, error = await status_and_error(await client.post("/", data=body, headers=GOOD))
        assert status == 400
        assert error.startswith("This is not a progress report: ")

    assert serve(use) == []


def test_a_client_that_comes_too_early_is_told_so_and_the_log_is_spared(caplog: pytest.LogCaptureFixture) -> None:
    async def use(client: TestClient[Any, Any]) -> None:
        response = await client.post("/", json=REPORT, headers={"Authorization": "Bearer early"})
        assert await status_and_error(response) == (503, "The operator has not looked at this job yet.")

    assert serve(use) == []
    assert caplog.records == []


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 4096):
        yield body[start : start + 4096]


@pytest.mark.parametrize("length_is_declared", [True, False])
def test_a_body_over_the_limit_is_refused_also_when_its_length_is_not_declared(length_is_declared: bool) -> None:
    def padded(size: int) -> bytes:
        body = json.dumps(REPORT).encode()
        return body + b" " * (size - len(body))

    async def post(client: TestClient[Any, Any], size: int) -> int:
        data = padded(size) if length_is_declared else in_chunks(padded(size))
        async with client.post("/", data=data, headers=GOOD) as response:
            return response.status

    async def use(client: TestClient[Any, Any]) -> None:
        assert await post(client, PROGRESS_BODY_LIMIT_BYTES) == 200
        assert await post(client, PROGRESS_BODY_LIMIT_BYTES + 1) == 413

    assert len(serve(use)) == 1


def test_a_compressed_body_is_refused_before_it_is_unpacked() -> None:
    async def use(client: TestClient[Any, Any]) -> None:
        body = gzip.compress(json.dumps(REPORT).encode())
        response = await client.post("/", data=body, headers={**GOOD, "Content-Encoding": "gzip"})
        assert response.status == 415

    assert serve(use) == []


def test_a_body_that_never_ends_is_given_up() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def use(client: TestClient[Any, Any]) -> None:
        async with client.post("/", data=endless(), headers=GOOD) as response:
            assert response.status == 408

    assert serve(use, read_timeout_seconds=0.05) == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_other_methods_are_refused(method: str) -> None:
    async def use(client: TestClient[Any, Any]) -> None:
        assert (await client.request(method, "/", headers=GOOD)).status == 405

    assert serve(use) == []


def test_no_token_reaches_a_log(caplog: pytest.LogCaptureFixture) -> None:
    async def use(client: TestClient[Any, Any]) -> None:
        for body in (json.dumps(REPORT), "{"):
            for token in (SECRET, "right", "wrong-token"):
                await client.post("/", data=body, headers={"Authorization": f"Bearer {token}"})

    with caplog.at_level(logging.DEBUG):
        serve(use)
    assert "ConnectionError" in caplog.text
    assert SECRET not in caplog.text
    assert "Bearer" not in caplog.text
    assert "wrong-token" not in caplog.text


def test_the_stock_callback_of_transformers_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own image that trains with Trainer reports here without knowing us."""
    token = tmp_path / "token"
    token.write_text("right\n")
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[])
    state, control = TrainerState(max_steps=8), TrainerControl()
    with run_receiver() as receiver:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", receiver.url)
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(token))
        monkeypatch.setattr(KubeflowCallback, "_MIN_UPDATE_INTERVAL", 0.0)
        stock: Any = KubeflowCallback  # not typed
        callback = stock()
        callback.on_train_begin(args, state, control)
        callback.on_log(args, state, control, logs={"loss": 1.25, "learning_rate": 1e-4})
        state.global_step, state.epoch = 2, 0.5
        callback.on_step_end(args, state, control)
        callback.on_train_end(args, state, control)
        reports = receiver.wait_for_reports(3)

    assert [report.progress_percentage for report in reports] == [0, 25, 100]
    assert reports[1].number("loss") == 1.25
    assert reports[1].number("current_step") == 2
    assert reports[1].number("total_steps") == 8
    assert reports[1].number("current_epoch") == 0.5
