"""A job with output.merged leaves a whole model beside its adapter, now or by the next attempt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.load import load_job_file
from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.publish import merged
from finetune_trainer.storage.manifest import parse_manifest, verify_tree
from finetune_trainer.storage.s3_store import S3Store
from tests.s3_server import S3Server
from tests.trainer.run.tiny_job import TinyJob


def _job(folder: Path, **output: Any) -> TinyJob:
    job = TinyJob(folder)
    job.spec["output"] |= {"merged": True, **output}
    return job


def _agrees_with_the_adapter(output: Path, base: str) -> bool:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(output / "merged").eval()(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(output / "adapter"))
        difference = (adapted.eval()(input_ids=ids).logits - whole).abs().max()
    return bool(difference < 1e-4)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_a_job_leaves_the_merged_model_beside_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = _job(tmp_path)
    result = job.run()
    assert result.succeeded
    assert result.message == f"The adapter is at {job.output}/adapter. The merged model is at {job.output}/merged."
    assert _agrees_with_the_adapter(job.output, job.spec["model_id"])
    said = capsys.readouterr().out
    assert f"The merged model is at {job.output}/merged. float32. On " in said
    manifest = parse_manifest((job.output / "merged" / "manifest.json").read_bytes(), "merged")
    verify_tree(job.output / "merged", manifest, "merged")
    adapter = parse_manifest((job.output / "adapter" / "manifest.json").read_bytes(), "adapter")
    assert manifest.details["run"] == adapter.details["run"]
    assert f"{job.output}/merged" in (job.output / "report.html").read_text()
    stops = json.loads((job.output / "adapter" / "generation_config.json").read_text())["eos_token_id"]
    assert json.loads((job.output / "merged" / "generation_config.json").read_text())["eos_token_id"] == stops
    before = (job.output / "merged" / "manifest.json").stat().st_mtime_ns
    assert job.run().message.endswith("nothing was trained.")
    assert (job.output / "merged" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_the_next_attempt_merges_what_an_attempt_published_and_did_not_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(tmp_path)

    def lost(*_args: Any, **_kwargs: Any) -> None:
        raise JobError(Reason.STORAGE_UNAVAILABLE, "The store is away: try again.")

    with monkeypatch.context() as patch:
        patch.setattr(merged, "merge", lost)
        with pytest.raises(JobError, match="is away"):
            job.run()
    assert (job.output / "adapter" / "manifest.json").is_file()
    assert not (job.output / "merged").exists()
    result = job.run()
    assert result.adapter is not None
    assert result.message.endswith(f"nothing was trained. The merged model is at {job.output}/merged.")
    assert _agrees_with_the_adapter(job.output, job.spec["model_id"])


def test_an_adapter_that_cannot_be_merged_is_still_a_result_and_the_job_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(tmp_path)

    def refused(*_args: Any, **_kwargs: Any) -> None:
        raise JobError(Reason.ADAPTER_UNPROVEN, "The merged model is refused.")

    monkeypatch.setattr(merged, "merge", refused)
    result = job.run()
    assert result.succeeded
    assert result.message.endswith("There is no merged model: The merged model is refused.")
    assert not (job.output / "merged").exists()


def test_a_merge_that_does_not_fit_the_memory_costs_the_job_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    job = _job(tmp_path)
    monkeypatch.setattr(merged, "merge", full)
    result = job.run()
    assert result.succeeded
    assert f"Run `finetune merge {job.output}/adapter` elsewhere." in result.message


def test_a_job_that_does_not_ask_gets_no_merged_model(tmp_path: Path) -> None:
    job = TinyJob(tmp_path)
    job.run()
    assert not (job.output / "merged").exists()


def test_a_merged_model_goes_to_an_object_store_with_its_manifest_last(
    tmp_path: Path, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    upload = S3Store.upload_file

    def noted(self: S3Store, file: Path, key: str) -> None:
        keys.append(key)
        upload(self, file, key)

    monkeypatch.setattr(S3Store, "upload_file", noted)
    job = _job(tmp_path, uri=f"s3://{s3_environment.new_bucket()}/jobs")
    assert job.run().message.endswith("/jobs/merged.")
    whole = [key for key in keys if key.startswith("merged/")]
    assert whole[-1] == "merged/manifest.json"
    assert {"merged/model.safetensors", "merged/config.json", "merged/tokenizer.json"} <= set(whole)


@pytest.mark.parametrize(
    ("sharding", "sentence"), [("auto", "2 GB for each billion"), ("fsdp", "run `finetune merge` on the adapter")]
)
def test_validation_says_what_a_merged_model_costs(tmp_path: Path, sharding: str, sentence: str) -> None:
    job = _job(tmp_path)
    job.spec["sharding"] = sharding
    (warning,) = [one for one in load_job_file(job.file()).warnings if one.path == "spec.output.merged"]
    assert sentence in warning.message


def test_where_gpus_share_the_model_the_run_says_that_it_is_not_merged(tmp_path: Path) -> None:
    spec = _job(tmp_path).job().spec
    (sentence,) = merged.sharded_notice(spec, sharded=True)
    assert "finetune merge" in sentence
    assert merged.sharded_notice(spec, sharded=False) == []
    assert merged.sharded_notice(TinyJob(tmp_path).job().spec, sharded=True) == []
