"""A whole job whose results go to a model repository of the Hub: interrupted, resumed, published, found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from finetune_api.outcome import Reason
from finetune_trainer import run
from finetune_trainer.errors import JobError
from tests.hub_server import Hub
from tests.trainer.run.tiny_job import TinyJob

WORK = "finetune-tiny"


@pytest.fixture
def pushes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with a token that may write to it. The content network's own protocol is not spoken here."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return hub


def _job(folder: Path, **spec: Any) -> TinyJob:
    return TinyJob(folder, output={"uri": "hf://owner/guard"}, **spec)


def test_a_job_is_resumed_from_the_hub_and_pushes_its_adapter_in_one_commit(
    tmp_path: Path, pushes: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*_args: Any) -> None:
        raise JobError(Reason.TERMINATED, "The node is taken away.")

    with monkeypatch.context() as patch:
        patch.setattr(run, "publish_best", away)
        with pytest.raises(JobError, match="taken away"):
            _job(tmp_path).run()
    repo = pushes.repos["owner/guard"]
    assert repo.private
    assert set(repo.files) == {".gitattributes"}
    capsys.readouterr()
    result = _job(tmp_path).run()
    assert f"Resuming from hf://owner/guard@{WORK}/checkpoints/step-" in capsys.readouterr().out
    assert result.adapter is not None
    assert result.adapter.uri == "hf://owner/guard"
    assert result.message == "The adapter is at hf://owner/guard."
    assert result.checkpoint is not None
    assert result.checkpoint.uri.startswith(f"hf://owner/guard@{WORK}/checkpoints/step-")
    (published,) = [commit for commit in pushes.commits if commit.branch == "main"]
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "manifest.json"} <= set(
        published.written
    )
    found = repo.at(WORK)
    assert found is not None
    assert {"metrics.jsonl", "report.html"} <= set(found[1])
    again = _job(tmp_path).run()
    assert again.message.endswith("is at hf://owner/guard: nothing was trained.")
    assert again.adapter == result.adapter
    assert len([commit for commit in pushes.commits if commit.branch == "main"]) == 1


def test_another_jobs_adapter_in_the_repository_is_a_conflict(tmp_path: Path, pushes: Hub) -> None:
    _job(tmp_path).run()
    with pytest.raises(JobError, match="already holds the adapter of another run") as caught:
        _job(tmp_path, learning_rate=1e-3).run()
    assert caught.value.reason is Reason.OUTPUT_CONFLICT


def test_a_token_that_may_only_read_is_refused_before_anything_is_trained(tmp_path: Path, pushes: Hub) -> None:
    pushes.read_only = {"hf_writer"}
    with pytest.raises(JobError, match="does not let this token write") as caught:
        _job(tmp_path).run()
    assert caught.value.reason is Reason.STORAGE_ACCESS_DENIED
    assert pushes.commits == []
