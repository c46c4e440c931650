"""A Hub cache that others filled: `from_pretrained`, older versions of huggingface_hub, a copy without links."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage import fetch_adapter, fetch_model, fetch_tokenizer
from tests.hub_server import COMMIT, Hub, Refusal, Repo
from tests.models import smollm2_folder

NAME = "team/model"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
TOKENIZER = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
SHARDED = {**TOKENIZER, "model.safetensors.index.json": INDEX, SHARDS[0]: b"1", SHARDS[1]: b"2"}


def by_hand(files: dict[str, bytes], *, links: bool = True, branch: str | None = "main") -> Path:
    """NAME's files as every version of huggingface_hub laid them out so far; returns the snapshot's folder."""
    repo = Path(constants.HF_HUB_CACHE) / "models--team--model"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    if branch:
        (repo / "refs" / branch).write_text(COMMIT)
    for name, data in files.items():
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if links:
            blob = repo / "blobs" / hashlib.sha256(data + name.encode()).hexdigest()
            blob.write_bytes(data)
            path.symlink_to(f"../../blobs/{blob.name}")
        else:
            path.write_bytes(data)
    return snapshot


@pytest.fixture
def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, which must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return hub


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cache_without_a_listing_counts(offline: Hub, links: bool, revision: str | None) -> None:
    snapshot = by_hand(SHARDED, links=links)
    for fetch in (fetch_tokenizer, fetch_model):
        model = fetch(NAME, revision)
        assert (model.path, model.resolved_revision) == (snapshot, COMMIT)
    assert offline.requests == []


@pytest.mark.parametrize(
    ("files", "fetch", "said"),
    [
        pytest.param(TOKENIZER, fetch_model, "without its weights", id="tokenizer only"),
        pytest.param(
            {name: SHARDED[name] for name in SHARDED if name != SHARDS[1]}, fetch_model, SHARDS[1], id="a shard less"
        ),
        pytest.param(
            {name: SHARDED[name] for name in SHARDED if name not in SHARDS},
            fetch_model,
            f"{SHARDS[0]}, {SHARDS[1]}",
            id="an index alone",
        ),
        pytest.param({"model.safetensors": b"1"}, fetch_model, r"without config\.json", id="weights only"),
        pytest.param({"config.json": b"{}"}, fetch_tokenizer, "without its tokenizer", id="no tokenizer"),
        pytest.param({"README.md": b""}, fetch_adapter, "without its weights", id="no adapter"),
    ],
)
def test_what_a_partly_filled_cache_lacks_is_named(
    offline: Hub, files: dict[str, bytes], fetch: Callable[[str], object], said: str
) -> None:
    by_hand(files)
    with pytest.raises(JobError, match=said) as failure:
        fetch(NAME)
    assert failure.value.reason is Reason.MODEL_NOT_FOUND
    assert f"{NAME} is in the cache" in failure.value.message
    assert "HF_HUB_OFFLINE" in failure.value.message


def test_a_link_without_its_file_is_missing(offline: Hub) -> None:
    """An interrupted clean-up, or a cache that was copied without its blobs."""
    snapshot = by_hand(SHARDED)
    (snapshot / SHARDS[0]).resolve().unlink()
    with pytest.raises(JobError, match=SHARDS[0]):
        fetch_model(NAME)


@pytest.mark.parametrize("name", ["tokenizer.json", SHARDS[0]])
@pytest.mark.parametrize("revision", [None, COMMIT])
@pytest.mark.parametrize("damage", [b"", b"~", b"longer"], ids=["cut", "changed", "longer"])
def test_a_damaged_copy_is_fetched_again(
    hub: Hub, name: str, revision: str | None, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    files = {**SHARDED, "tokenizer.json": b"[]"}
    hub.repos[NAME] = Repo(files)
    fetched = fetch_model(NAME, revision).path
    (fetched / name).resolve().write_bytes(damage)
    hub.requests.clear()
    assert (fetch_model(NAME, revision).path / name).read_bytes() == files[name]
    assert hub.downloads() == {name}
    assert "is damaged" in caplog.text


def test_a_copy_that_is_cut_is_no_copy_where_nobody_may_be_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(SHARDED)
    (fetch_model(NAME).path / SHARDS[0]).resolve().write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(JobError, match=f"in the cache without {SHARDS[0]}"):
        fetch_model(NAME)


def test_a_commit_without_its_branch_is_offered(offline: Hub) -> None:
    by_hand(SHARDED, branch=None)
    with pytest.raises(JobError, match=f"only at commit {COMMIT}"):
        fetch_model(NAME)
    assert fetch_model(NAME, COMMIT).resolved_revision == COMMIT


def test_what_a_listing_names_must_be_there(offline: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing made by one download tells what another one left out."""
    offline.repos[NAME] = Repo(SHARDED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch_tokenizer(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(JobError, match=f"without {SHARDS[0]}, {SHARDS[1]},"):
        fetch_model(NAME)


def test_an_unlisted_cache_survives_an_outage(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = by_hand(SHARDED)
    hub.always = Refusal(503)
    with caplog.at_level(logging.WARNING):
        assert fetch_model(NAME, sleep=lambda seconds: None).path == snapshot
    assert "copy in the cache" in caplog.text


def test_an_outage_says_what_the_cache_lacks(hub: Hub) -> None:
    by_hand(TOKENIZER)
    hub.always = Refusal(503)
    with pytest.raises(
        JobError, match=r"answered 503 .*\(team/model is in the cache without its weights\)\."
    ) as failure:
        fetch_model(NAME, sleep=lambda seconds: None)
    assert failure.value.reason is Reason.HUB_UNAVAILABLE


def test_an_unlisted_cache_is_completed_where_the_hub_may_be_asked(hub: Hub) -> None:
    """Also for a pinned commit: a template that is not in the cache would change what is trained."""
    by_hand(SHARDED)
    hub.repos[NAME] = Repo({**SHARDED, "chat_template.jinja": b"{{ messages }}"})
    assert (fetch_tokenizer(NAME, COMMIT).path / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    fetch_model(NAME, COMMIT)
    assert hub.downloads() == {"chat_template.jinja"}


def test_a_cache_filled_by_from_pretrained_counts(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files, sharded, fetched by a process that only knows transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tmp_path / "made"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(made, max_shard_size="4KB")
    for path in smollm2_folder().glob("*token*"):
        (made / path.name).write_bytes(path.read_bytes())
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    hub.repos[NAME] = Repo({**files, "preprocessor_config.json": b"{}"})
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"AutoModelForCausalLM.from_pretrained({NAME!r})",
        f"AutoTokenizer.from_pretrained({NAME!r})",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch_tokenizer(NAME) == fetch_model(NAME)
    assert not (fetch_model(NAME).path / "preprocessor_config.json").exists()
    assert hub.requests == []
