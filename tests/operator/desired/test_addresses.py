"""The addresses of a job, and the claims among them: what is read, and what is written to."""

from __future__ import annotations

from typing import Any

from finetune_api.storage_uri import parse, parse_output
from finetune_operator.desired.addresses import JobAddress, claims, job_addresses
from tests.operator.desired.built import stored

PROMPT: dict[str, Any] = {"prompt_format": {"use_hugging_face_chat_template": True}}
READ: dict[str, Any] = {
    "train_path": "pvc://data/train.jsonl",
    "valid_path": "pvc://shared/valid.jsonl",
    "model_id": "pvc://models/base",
    "initial_base_model_ckpt_path": "s3://models/later",
    "initial_adapter_model_ckpt_path": "./adapter",
}


def test_every_address_is_told_with_its_place_the_output_last() -> None:
    job = stored(**READ, output={"uri": "pvc://shared/out"}, generation_config=PROMPT)
    read = [JobAddress(f"spec.{key}", parse(address), written=False) for key, address in READ.items()]
    assert [*job_addresses(job)] == [*read, JobAddress("spec.output.uri", parse_output("pvc://shared/out"), True)]
    assert [*claims(job).items()] == [("data", False), ("models", False), ("shared", True)]


def test_what_is_looked_up_on_the_hub_has_no_address() -> None:
    job = stored(model_id="owner/name.v1", initial_base_model_ckpt_path="gpt2", generation_config=PROMPT)
    assert [address.path for address in job_addresses(job)] == ["spec.train_path"]
