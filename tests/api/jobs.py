"""Jobs that the contract's tests start from."""

from __future__ import annotations

from typing import Any

from finetune_api.job import API_VERSION, KIND, FineTuneJob
from finetune_api.load import load_manifest

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
"""A natively supported model: it needs no generation_config."""


def spec(**changes: Any) -> dict[str, Any]:
    """The least spec that is accepted without a notice, with `changes` on top."""
    least = {"model_id": LLAMA, "train_path": "data/train.jsonl", "task": "instruction_tuning", "lora_config": {}}
    return least | changes


def manifest(**changes: Any) -> dict[str, Any]:
    """The least manifest, with `changes` on top of its spec."""
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "guard"}, "spec": spec(**changes)}


def job(**changes: Any) -> FineTuneJob:
    """The job of `manifest(**changes)`, which must be one that is accepted."""
    result = load_manifest(manifest(**changes))
    assert result.job is not None, [str(problem) for problem in result.errors]
    return result.job
