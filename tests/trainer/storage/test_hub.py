"""What the Hugging Face Hub answers, over a real socket, and what a job says about it."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage import fetch_adapter, fetch_file, fetch_model, fetch_tokenizer
from finetune_trainer.storage import hub as hub_module
from tests.hub_server import COMMIT, SIGNATURE, Hub, Refusal, Repo
from tests.s3_server import free_port

NAME = "team/model"
MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b'{"file": "tokenizer.json"}',
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"1" * 1000,
    "model-00002-of-00002.safetensors": b"2" * 1000,
    "model.safetensors.index.json": b'{"file": "model.safetensors.index.json"}',
    "pytorch_model.bin": b"the same again",
    "model.gguf": b"the same again",
    "onnx/model.onnx": b"the same again",
    "original/consolidated.00.pth": b"the same again",
    "modeling_custom.py": b"import os",
    "README.md": b"# Model",
}
NEEDED = {
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}
CARD = {"README.md"}
"""Comes with the weights, for its licence."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that huggingface_hub itself would have slept between its tries."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


def refused(hub: Hub, revision: str | None = None) -> JobError:
    """The error of fetching NAME; waits are skipped."""
    with pytest.raises(JobError) as failure:
        fetch_model(NAME, revision, sleep=lambda seconds: None)
    return failure.value


def test_only_the_needed_files_of_one_commit_are_fetched(hub: Hub) -> None:
    hub.repos[NAME] = Repo(MODEL)
    model = fetch_model(NAME)
    assert model.resolved_revision == COMMIT
    assert hub.downloads() == NEEDED | CARD
    assert {path.name for path in model.path.iterdir()} == NEEDED | CARD
    assert (model.path / "model-00001-of-00002.safetensors").read_bytes() == b"1" * 1000


def test_the_tokenizer_comes_without_weights(hub: Hub) -> None:
    hub.repos[NAME] = Repo(MODEL)
    assert fetch_tokenizer(NAME).resolved_revision == COMMIT
    assert hub.downloads() == NEEDED - {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_code_is_fetched_only_when_it_is_trusted(hub: Hub) -> None:
    hub.repos[NAME] = Repo(MODEL)
    fetch_model(NAME, trust_remote_code=True)
    assert hub.downloads() == NEEDED | CARD | {"modeling_custom.py"}


def test_an_adapter_is_fetched_without_its_neighbours(hub: Hub) -> None:
    hub.repos[NAME] = Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": b"1", "optimizer.pt": b"2"})
    assert fetch_adapter(NAME).resolved_revision == COMMIT
    assert hub.downloads() == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_complete_pinned_commit_is_used_without_asking(hub: Hub) -> None:
    hub.repos[NAME] = Repo(MODEL)
    first = fetch_model(NAME, COMMIT)
    hub.requests.clear()
    assert fetch_model(NAME, COMMIT) == first
    assert hub.requests == []


def test_a_cached_tokenizer_is_not_taken_for_the_model(hub: Hub) -> None:
    hub.repos[NAME] = Repo(MODEL)
    fetch_tokenizer(NAME, COMMIT)
    model = fetch_model(NAME, COMMIT)
    assert {path.name for path in model.path.iterdir()} == NEEDED | CARD


def test_the_token_is_sent_but_an_empty_one_is_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(MODEL, gated_files=True, token="hf_secret")
    monkeypatch.setenv("HF_TOKEN", "")
    error = refused(hub)
    assert error.reason is Reason.MODEL_ACCESS_DENIED
    assert "no token was sent" in error.message
    assert hub.tokens == set()
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    assert fetch_model(NAME).resolved_revision == COMMIT
    assert hub.tokens == {"hf_secret"}


@pytest.mark.parametrize(
    ("answer", "token", "reason", "said"),
    [
        pytest.param(Refusal(401), None, Reason.MODEL_ACCESS_DENIED, "set HF_TOKEN", id="401 without token"),
        pytest.param(
            Refusal(401, {"X-Error-Code": "RepoNotFound"}),
            None,
            Reason.MODEL_NOT_FOUND,
            "correct model_id",
            id="unknown",
        ),
        pytest.param(
            Refusal(401, {"X-Error-Code": "GatedRepo"}), None, Reason.MODEL_ACCESS_DENIED, "gated", id="gated"
        ),
        pytest.param(
            Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            "hf_wrong",
            Reason.MODEL_ACCESS_DENIED,
            "refused the token",
            id="bad token",
        ),
        pytest.param(
            Refusal(403, {"X-Error-Code": "GatedRepo"}),
            "hf_ok",
            Reason.MODEL_ACCESS_DENIED,
            "accept its licence at",
            id="403",
        ),
        pytest.param(Refusal(403), "hf_ok", Reason.MODEL_ACCESS_DENIED, "accept its licence at", id="bare 403"),
        pytest.param(
            Refusal(403, {"X-Error-Message": "Access to this resource is disabled."}),
            None,
            Reason.MODEL_ACCESS_DENIED,
            "disabled",
            id="disabled",
        ),
        pytest.param(
            Refusal(404, {"X-Error-Code": "RepoNotFound"}),
            "hf_ok",
            Reason.MODEL_NOT_FOUND,
            "correct model_id",
            id="404",
        ),
        pytest.param(Refusal(404), None, Reason.MODEL_NOT_FOUND, "correct model_id", id="bare 404"),
        pytest.param(Refusal(429), None, Reason.HUB_UNAVAILABLE, "limits requests", id="429"),
        pytest.param(Refusal(500), None, Reason.HUB_UNAVAILABLE, "answered 500", id="500"),
        pytest.param(Refusal(503), None, Reason.HUB_UNAVAILABLE, "answered 503", id="503"),
    ],
)
def test_each_refusal_says_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, answer: Refusal, token: str | None, reason: Reason, said: str
) -> None:
    hub.always = answer
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    error = refused(hub)
    assert error.reason is reason
    assert said in error.message
    assert NAME in error.message
    assert "hf_" not in error.message
    assert "\n" not in error.message
    assert error.__suppress_context__, "the library's own text may hold a signed address"


def test_a_licence_that_was_not_accepted_names_the_page(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(MODEL, licence_accepted=False)
    monkeypatch.setenv("HF_TOKEN", "hf_ok")
    assert f"{hub.endpoint}/{NAME}" in refused(hub).message


def test_an_unknown_revision_names_its_key(hub: Hub) -> None:
    hub.repos[NAME] = Repo(MODEL)
    error = refused(hub, "v9")
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert "'v9'" in error.message
    assert "model_revision" in error.message


def test_a_limited_request_waits_as_long_as_the_hub_asks(hub: Hub) -> None:
    hub.repos[NAME] = Repo(MODEL)
    hub.refusals = [Refusal(429, {"Retry-After": "7"}), Refusal(503), Refusal(429, {"Retry-After": "86400"})]
    slept: list[float] = []
    assert fetch_model(NAME, sleep=slept.append).resolved_revision == COMMIT
    assert slept == [8, 2, hub_module.LONGEST_WAIT_SECONDS]


def test_a_limited_download_waits_too(hub: Hub, waits: list[float]) -> None:
    hub.repos["team/data"] = Repo({"train.jsonl": b"{}"})
    hub.refusals = [Refusal(429, {"Retry-After": "7"})] * 2
    assert fetch_file("hf://datasets/team/data/train.jsonl").read_bytes() == b"{}"
    assert 8 in waits


def test_a_model_in_the_cache_survives_an_outage(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.repos[NAME] = Repo(MODEL)
    first = fetch_model(NAME)
    hub.always = Refusal(503)
    with caplog.at_level(logging.WARNING):
        assert fetch_model(NAME, sleep=lambda seconds: None) == first
    assert "copy in the cache" in caplog.text
    hub.always = Refusal(403, {"X-Error-Code": "GatedRepo"})
    assert refused(hub).reason is Reason.MODEL_ACCESS_DENIED


def test_offline_mode_reads_the_cache_and_says_when_it_cannot(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(MODEL)
    first = fetch_model(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_model(NAME) == first
    with pytest.raises(JobError, match="HF_HUB_OFFLINE") as failure:
        fetch_model("team/another")
    assert failure.value.reason is Reason.MODEL_NOT_FOUND


def test_an_unreachable_hub_is_retryable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("HF_ENDPOINT", f"http://{address}")
    error = refused(hub)
    assert error.reason is Reason.HUB_UNAVAILABLE
    assert error.exit_code >= 128
    assert address in error.message


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-x/y"])
def test_what_cannot_be_a_name_is_refused(hub: Hub, name: str) -> None:
    with pytest.raises(JobError, match="correct model_id") as failure:
        fetch_model(name)
    assert failure.value.reason is Reason.MODEL_NOT_FOUND
    assert hub.requests == []


def test_a_model_without_trainable_weights_is_refused_before_its_download(hub: Hub) -> None:
    hub.repos[NAME] = Repo({"config.json": b"{}", "model.onnx": b"1"})
    error = refused(hub)
    assert error.reason is Reason.MODEL_UNSUPPORTED
    assert "holds no weights to train" in error.message
    assert hub.downloads() == set()


def test_a_model_that_does_not_fit_is_refused_before_its_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(MODEL)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1999}))
    error = refused(hub)
    assert error.reason is Reason.DISK_FULL
    assert hub.downloads() == set()


def test_a_data_file_comes_from_a_dataset_repository(hub: Hub, waits: list[float]) -> None:
    hub.repos["team/data"] = Repo({"sub/train.jsonl": b"{}\n"})
    path = fetch_file("hf://datasets/team/data@main/sub/train.jsonl")
    assert path.read_bytes() == b"{}\n"
    assert ("GET", "/datasets/team/data/resolve/main/sub/train.jsonl") in hub.requests


@pytest.mark.parametrize(
    ("uri", "always", "reason"),
    [
        ("hf://datasets/team/data/none.jsonl", None, Reason.STORAGE_NOT_FOUND),
        ("hf://datasets/team/data@v9/train.jsonl", None, Reason.STORAGE_NOT_FOUND),
        ("hf://datasets/team/none/train.jsonl", None, Reason.STORAGE_NOT_FOUND),
        (
            "hf://datasets/team/data/train.jsonl",
            Refusal(403, {"X-Error-Code": "GatedRepo"}),
            Reason.STORAGE_ACCESS_DENIED,
        ),
        ("hf://datasets/team/data/train.jsonl", Refusal(500), Reason.HUB_UNAVAILABLE),
    ],
)
def test_a_data_file_that_cannot_be_had_is_a_storage_problem(
    hub: Hub, waits: list[float], uri: str, always: Refusal | None, reason: Reason
) -> None:
    hub.repos["team/data"] = Repo({"train.jsonl": b"{}"})
    hub.always = always
    with pytest.raises(JobError) as failure:
        fetch_file(uri)
    assert failure.value.reason is reason
    assert uri in failure.value.message


def test_large_files_come_from_a_content_network_that_never_sees_the_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[NAME] = Repo(MODEL)
    hub.content_network = True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model = fetch_model(NAME)
    assert (model.path / "model-00001-of-00002.safetensors").read_bytes() == b"1" * 1000
    assert hub.tokens == {"hf_secret"}
    assert hub.content_network_tokens == set()


def test_a_signed_address_never_reaches_the_message(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.repos[NAME] = Repo(MODEL)
    hub.content_network = True
    hub.content_network_refusal = Refusal(403)
    error = refused(hub)
    assert error.reason is Reason.MODEL_ACCESS_DENIED
    assert SIGNATURE not in error.message
    assert SIGNATURE not in "".join(traceback.format_exception(error))
    assert SIGNATURE not in caplog.text


def test_the_address_of_a_mirror_may_end_in_a_slash(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(MODEL)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.endpoint}/")
    assert fetch_model(NAME).resolved_revision == COMMIT


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(MODEL)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert refused(hub).reason is Reason.STORAGE_NOT_FOUND
