"""Keys of other tools are answered with what is written here instead, and every such answer is one that works."""

from __future__ import annotations

import re

import pytest

from finetune_api.foreign_keys import FOREIGN_KEYS
from finetune_api.job import FineTuneJobSpec
from finetune_api.load import load_job
from finetune_api.spec_errors import _homes

KNOWN = {field.alias or name for name, field in FineTuneJobSpec.model_fields.items()}


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_a_key_of_another_tool_is_answered_with_what_is_written_here(key: str) -> None:
    text = f"""
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: a}}
spec:
  model_id: owner/name
  train_path: train.jsonl
  generation_config: {{prompt_format: {{use_hugging_face_chat_template: true}}}}
  {key}: 1
"""
    loaded = load_job(text, source="a.yaml")
    (found,) = [problem for problem in loaded.errors if problem.path.endswith(key)]
    assert found.message == f"{key} is not a known key: {FOREIGN_KEYS[key]}."
    assert key not in KNOWN


@pytest.mark.parametrize("answer", sorted(set(FOREIGN_KEYS.values())))
def test_an_answer_names_a_key_that_there_is(answer: str) -> None:
    homes = {**_homes(), "name": "metadata"}
    for written in re.findall(r"write ([A-Za-z_.]+)", answer):
        *parents, leaf = written.rstrip(".").split(".")
        assert leaf in homes
        if parents and parents != ["metadata"]:
            assert homes[leaf].removeprefix("spec.").removeprefix("spec") in (".".join(parents), "")
