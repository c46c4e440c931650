"""A model repository of the Hub as an output: what is pushed where, in how many commits, and what refusals mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from finetune_api.outcome import Reason
from finetune_api.storage_uri import parse_output
from finetune_trainer.errors import JobError
from finetune_trainer.storage import open_store, read_manifest, write_manifest
from finetune_trainer.storage.hub_store import HubStore
from tests.hub_server import Hub, Refusal, Repo

WORK = "finetune-tiny"
TOKEN = "hf_writer"


@pytest.fixture
def pushes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with a token that may write to it. The content network's own protocol is not spoken here."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return hub


def _store(uri: str = "hf://owner/guard") -> HubStore:
    return HubStore(parse_output(uri), work=WORK, sleep=lambda _: None)


def _folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_a_repository_is_made_private_and_each_folder_is_one_commit_on_the_jobs_branch(
    pushes: Hub, tmp_path: Path
) -> None:
    folder = _folder(tmp_path / "step", adapter_model__safetensors="weights", state__json="{}")
    write_manifest(folder, {"step": 4})
    store = _store()
    store.upload_tree(folder, "checkpoints/step-00000004")
    repo = pushes.repos["owner/guard"]
    assert repo.private
    assert set(repo.files) == {".gitattributes"}
    (commit,) = pushes.commits
    assert commit.branch == WORK
    assert len(commit.written) == 3
    assert store.list("checkpoints") == [f"checkpoints/step-00000004/{path.name}" for path in sorted(folder.iterdir())]
    store.download_tree("checkpoints/step-00000004", tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    store.delete_tree("checkpoints/step-00000004")
    assert store.list("checkpoints") == []
    assert store.uri_of("checkpoints") == f"hf://owner/guard@{WORK}/checkpoints"
    assert pushes.tokens == {TOKEN}


@pytest.mark.parametrize(("uri", "branch"), [("hf://owner/guard", "main"), ("hf://owner/guard@v2", "v2")])
def test_the_adapter_appears_at_the_top_in_one_commit_with_its_manifest(
    pushes: Hub, tmp_path: Path, uri: str, branch: str
) -> None:
    folder = _folder(tmp_path / "adapter", adapter_config__json="{}", adapter_model__safetensors="weights")
    store = _store(uri)
    store.upload_tree(folder, "adapter")
    assert read_manifest(store, "adapter") is None
    store.download_tree("adapter", tmp_path / "copy", paths=["adapter_model.safetensors"])
    assert [commit.branch for commit in pushes.commits] == [WORK]
    manifest = write_manifest(folder)
    store.write_bytes("adapter/manifest.json", manifest.to_bytes())
    (published,) = [commit for commit in pushes.commits if commit.branch == branch]
    assert set(published.written) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    again = _store(uri)
    assert read_manifest(again, "adapter") == manifest
    assert again.uri_of("adapter") == uri
    assert set(again.list("adapter")) == {f"adapter/{path}" for path in published.written}
    found = pushes.repos["owner/guard"].at(WORK)
    assert found is not None
    assert not [path for path in found[1] if path.startswith("adapter/")]
    assert [path for method, path in pushes.requests if method == "PUT"] != []


def test_an_adapter_that_fails_its_proof_never_reaches_the_top(pushes: Hub, tmp_path: Path) -> None:
    store = _store()
    store.upload_tree(_folder(tmp_path / "adapter", adapter_config__json="{}"), "adapter")
    store.delete_tree("adapter")
    repo = pushes.repos["owner/guard"]
    assert set(repo.files) == {".gitattributes"}
    assert store.list("adapter") == []


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors"])
def test_a_repository_with_a_model_of_somebody_else_is_not_touched(pushes: Hub, name: str) -> None:
    pushes.repos["owner/guard"] = Repo({"README.md": b"mine", name: b"mine"})
    with pytest.raises(JobError, match="already holds") as caught:
        _store().exists("adapter/manifest.json")
    assert caught.value.reason is Reason.OUTPUT_CONFLICT
    assert pushes.commits == []


def test_a_readme_in_an_empty_repository_is_no_obstacle(pushes: Hub, tmp_path: Path) -> None:
    pushes.repos["owner/guard"] = Repo({"README.md": b"to come"})
    store = _store()
    assert not store.exists("adapter/manifest.json")
    store.write_bytes("report.html", b"<p>")
    assert store.read_bytes("report.html") == b"<p>"
    assert pushes.repos["owner/guard"].files == {"README.md": b"to come"}


def test_an_adapter_that_another_run_wrote_meanwhile_is_not_overwritten(pushes: Hub, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "adapter", adapter_config__json="{}")
    store = _store()
    store.upload_tree(folder, "adapter")
    pushes.repos["owner/guard"].files |= {"adapter_config.json": b"{}", "manifest.json": b"{}"}
    with pytest.raises(JobError, match="Another run") as caught:
        store.write_bytes("adapter/manifest.json", write_manifest(folder).to_bytes())
    assert caught.value.reason is Reason.OUTPUT_CONFLICT


def test_the_merged_model_goes_beside_it(pushes: Hub, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "merged", model__safetensors="weights")
    write_manifest(folder)
    store = _store()
    store.delete_tree("merged")
    store.upload_tree(folder, "merged")
    assert set(pushes.repos["owner/guard"].files) == {
        ".gitattributes",
        "merged/model.safetensors",
        "merged/manifest.json",
    }
    assert store.uri_of("merged") == "hf://owner/guard/merged"
    assert read_manifest(store, "merged") is not None
    # Not a model of somebody else's, for the next attempt.
    assert _store().list("adapter") == []


REFUSALS = [
    (401, Reason.STORAGE_ACCESS_DENIED, "refused the token"),
    (403, Reason.STORAGE_ACCESS_DENIED, "write access"),
    (404, Reason.STORAGE_NOT_FOUND, "correct output.uri"),
    (409, Reason.STORAGE_UNAVAILABLE, "was changed"),
    (412, Reason.STORAGE_UNAVAILABLE, "was changed"),
    (429, Reason.HUB_UNAVAILABLE, "answered 429"),
    (400, Reason.STORAGE_ACCESS_DENIED, r"refused .* \(400\)"),
    (500, Reason.HUB_UNAVAILABLE, "answered 500"),
    (503, Reason.HUB_UNAVAILABLE, "answered 503"),
]


@pytest.mark.parametrize(("status", "reason", "sentence"), REFUSALS)
def test_each_refusal_of_a_commit_has_a_reason_and_a_sentence(
    pushes: Hub, status: int, reason: Reason, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    store = _store()
    assert not store.exists("metrics.jsonl")
    pushes.write_refusals = [Refusal(status)] * 100
    with pytest.raises(JobError, match=sentence) as caught:
        store.write_bytes("metrics.jsonl", b"{}")
    assert caught.value.reason is reason
    assert "\n" not in caught.value.message
    assert "Amz" not in caught.value.message


def test_a_busy_hub_is_asked_again(pushes: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    store = _store()
    pushes.write_refusals = [Refusal(503), Refusal(429)]
    store.write_bytes("metrics.jsonl", b"{}")
    assert store.read_bytes("metrics.jsonl") == b"{}"


@pytest.mark.parametrize(("token", "sentence"), [(None, "No token was sent"), ("hf_reader", "does not let this token")])
def test_who_may_not_write_is_told_before_anything_is_trained(
    pushes: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, sentence: str
) -> None:
    pushes.read_only = {"hf_reader"}
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(JobError, match=sentence) as caught:
        _store().exists("metrics.jsonl")
    assert caught.value.reason is Reason.STORAGE_ACCESS_DENIED


def test_a_hub_that_is_not_there_is_the_worlds_fault(pushes: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(JobError, match="broke") as caught:
        _store().exists("metrics.jsonl")
    assert caught.value.reason is Reason.HUB_UNAVAILABLE


def test_data_sets_hold_no_results() -> None:
    with pytest.raises(JobError, match="holds no results") as caught:
        open_store("hf://datasets/owner/name/file.jsonl")
    assert caught.value.reason is Reason.INVALID_SPEC
