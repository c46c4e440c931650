"""What a job says of its tracker is checked before anything is fetched, and no setting is ignored in silence."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import Reason
from finetune_api.training import Logger
from finetune_trainer.errors import JobError
from finetune_trainer.train.tracker_settings import MlflowConfig, check_tracker, is_outage, read_config, without_secrets


def logger(provider: str, **config: Any) -> Logger:
    return Logger.model_validate({"provider": provider, "provider_config": config})


@pytest.mark.parametrize(
    ("asked", "environ", "told"),
    [
        (None, {}, []),
        (logger("wandb", project="guards", mode="offline", anonymous=True), {}, ["anonymous"]),
        (logger("wandb", tags="night", group="a", config={"x": 1}), {"WANDB_API_KEY": "k"}, []),
        (logger("wandb"), {"WANDB_MODE": "disabled"}, []),
        (logger("tensorboard", logging_dir="/runs", project="x"), {}, ["project"]),
    ],
)
def test_settings_without_effect_are_named(asked: Logger | None, environ: dict[str, str], told: list[str]) -> None:
    assert check_tracker(asked, environ) == [f"logger.provider_config.{key} has no effect." for key in told]


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        (logger("wandb"), "there is no key: give WANDB_API_KEY"),
        (logger("wandb", tags={"a": "b"}), "provider_config.tags is nothing that Weights & Biases takes"),
        (logger("wandb", mode="of-line"), "provider_config.mode is nothing that"),
        (logger("mlflow"), "no server is named: write provider_config.tracking_uri"),
        (logger("mlflow", tracking_uri="gopher://x"), "MLflow cannot be used"),
        (logger("mlflow", tracking_uri="file:///x", experiment_name="it's"), "quotation mark"),
        (logger("mlflow", tags=["a"]), "provider_config.tags is nothing that MLflow takes"),
        (logger("tensorboard", logging_dir=["a"]), "provider_config.logging_dir is nothing that TensorBoard takes"),
    ],
)
def test_a_wrong_setting_is_refused(asked: Logger, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(JobError) as caught:
        check_tracker(asked, {})
    assert caught.value.reason is Reason.INVALID_SPEC
    assert part in caught.value.message


@pytest.mark.parametrize("provider", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(JobError, match=f"{provider}, whose Python package is not installed") as caught:
        check_tracker(logger(provider), {})
    assert caught.value.reason is Reason.INVALID_SPEC


def test_a_key_in_netrc_is_a_key(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine wandb.example.org login user password k\n")
    asked = logger("wandb", base_url="https://wandb.example.org")
    assert check_tracker(asked, {"NETRC": str(file)}) == []


def test_the_environment_stays_where_it_names_a_server() -> None:
    environ = {"MLFLOW_TRACKING_URI": "https://ours", "MLFLOW_EXPERIMENT_NAME": "platform"}
    found = read_config(logger("mlflow", tracking_uri="https://theirs", experiment_name="mine"), environ)
    assert isinstance(found, MlflowConfig)
    assert (found.tracking_uri, found.experiment_name) == ("https://ours", "platform")


def test_an_experiment_that_is_missing_is_refused_where_the_job_does_not_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = {"tracking_uri": f"file://{tmp_path}/mlruns", "experiment_name": "guards"}
    assert check_tracker(logger("mlflow", **config), {}) == []
    strict = logger("mlflow", **config, create_experiment_if_not_exists=False)
    with pytest.raises(JobError, match="MLflow has no experiment guards: create it"):
        check_tracker(strict, {})
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=config["tracking_uri"])
    made = client.create_experiment("guards")
    assert check_tracker(strict, {}) == []
    client.delete_experiment(made)
    with pytest.raises(JobError, match="experiment guards is deleted"):
        check_tracker(strict, {})


@contextmanager
def server(status: int) -> Iterator[str]:
    """A server that answers everything with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_request(self, *args: object) -> None:
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        found.shutdown()
        found.server_close()


def test_a_server_that_fails_is_told_of_and_one_that_refuses_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server(503) as address:
        (told,) = check_tracker(logger("mlflow", tracking_uri=address), {})
    assert told.startswith("MLflow does not answer now (")
    with server(401) as address, pytest.raises(JobError, match="MLflow cannot be used"):
        check_tracker(logger("mlflow", tracking_uri=address), {})


@pytest.mark.parametrize(
    ("address", "status", "outage"),
    [
        ("https://x", 500, True),
        ("https://x", 503, True),
        ("databricks://x", 500, True),
        ("http://x", 429, True),
        ("http://x", 408, True),
        ("http://x", 401, False),
        ("http://x", 404, False),
        ("file:///x", 500, False),
        ("sqlite:///x", 500, False),
    ],
)
def test_a_mistake_is_told_from_an_outage(address: str, status: int, outage: bool) -> None:
    assert is_outage(address, status) is outage


def test_what_is_told_has_no_secrets() -> None:
    text = "POST https://me:pw@example.org/api with key0123456 failed"
    assert without_secrets(text, {"WANDB_API_KEY": "key0123456"}) == (
        "POST https://***@example.org/api with *** failed"
    )
