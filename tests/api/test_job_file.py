"""The effective job as a file: whoever reads it trains the same job."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.defaults import effective_job
from finetune_api.job import FineTuneJob
from finetune_api.job_file import job_json, job_yaml
from finetune_api.load import load_job


def _job(system: str = "You are a helper.", **spec: object) -> FineTuneJob:
    spec = {
        "model_id": "acme/model",
        "train_path": "train.jsonl",
        "generation_config": {
            "prompt_format": {
                "system": "{instruction}",
                "user": "{instruction}",
                "assistant": "{instruction}</s>",
                "default_system_message": system,
            }
        },
        **spec,
    }
    return FineTuneJob.model_validate({"metadata": {"name": "job"}, "spec": spec})


def _read_back(job: FineTuneJob) -> FineTuneJob:
    """As it comes out of a YAML file, and out of one that holds JSON."""
    read = [load_job(write(job), source="job.yaml") for write in (job_yaml, job_json)]
    assert read[0].job is not None, read[0].errors
    assert read[1].job == read[0].job
    # JSON is YAML too, and says the same to whoever reads it so.
    assert yaml.safe_load(job_json(job)) == json.loads(job_json(job))
    return read[0].job


# Texts that YAML readers disagree about come first; the rest is anything that a text can hold.
_TRAPS = ["1e-4", "1:30", "0o7", "0b1", "017", "1_000", "yes", "off", "~", "null", ".5", "=", "<<", "2026-01-01", " a "]


@given(st.sampled_from(_TRAPS) | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_every_text_reads_back_as_it_was(text: str) -> None:
    job = effective_job(_job(text))
    assert _read_back(job) == job


@pytest.mark.parametrize("text", ["a\nb\n", "\n", "tab\there", "trailing \n", "\u2028", "\x85", "é☃😀"])
def test_line_breaks_and_controls_read_back(text: str) -> None:
    job = effective_job(_job(text))
    assert _read_back(job) == job


def test_a_filled_in_job_reads_back_without_new_warnings() -> None:
    job = effective_job(_job(learning_rate=1e-5, workers={"nodes": 2, "gpusPerNode": 4}, output={"uri": "/out"}))
    result = load_job(job_yaml(job), source="job.yaml")
    assert result.job == job
    assert result.warnings == []
