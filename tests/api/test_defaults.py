"""Defaults: what a job becomes, and what its author is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.defaults import effective_job, notices
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.load import load_job_file, load_manifest
from finetune_api.native_models import native_generation_config
from finetune_api.prompt_format import PromptFormat
from finetune_api.training import CheckpointFrequency
from tests.api.jobs import LLAMA, job, manifest

FORMAT = {"system": "{instruction}", "user": "{instruction}", "assistant": "{instruction}</s>"}


def _effective(**changes: Any) -> FineTuneJobSpec:
    return effective_job(job(**changes)).spec


def test_the_least_job_gets_the_documented_defaults() -> None:
    spec = _effective()
    assert spec.model_dump(exclude_none=True, exclude={"generation_config", "secrets"}) == {
        "model_id": LLAMA,
        "trust_remote_code": False,
        "train_path": "data/train.jsonl",
        "task": "instruction_tuning",
        "max_invalid_row_share": 0.0,
        "max_dropped_row_share": 0.1,
        "max_truncated_row_share": 1.0,
        "min_update_steps": 100,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "lora_config": {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": "all-linear",
            "experts": False,
            "bias": "none",
            "modules_to_save": [],
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "task_type": "CAUSAL_LM",
            "use_rslora": False,
            "use_dora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "inference_mode": False,
        },
        "padding": "longest",
        "sharding": "auto",
        "num_checkpoints_to_keep": 1,
        "eval_first": False,
        "workers": {
            "nodes": 1,
            "gpusPerNode": 1,
            "gpuResourceName": "nvidia.com/gpu",
            "imagePullSecrets": [],
            "nodeSelector": {},
            "tolerations": [],
            "env": [],
            "volumes": [],
        },
        "suspend": False,
        "backoffLimit": 3,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_epochs": 3}, {"num_epochs": 3, "min_update_steps": None}),
        ({"min_num_update_steps": 7}, {"min_update_steps": 7, "min_num_update_steps": None}),
        ({"no_gradient_checkpoint": True}, {"gradient_checkpointing": False, "no_gradient_checkpoint": None}),
        ({"no_gradient_checkpoint": False}, {"gradient_checkpointing": True}),
        ({}, {"gradient_checkpointing": None, "train_batch_size_per_device": None, "output": None}),
        # Both follow from the data.
        ({"context_length": 1000}, {"train_batch_size_per_device": None, "eval_batch_size_per_device": None}),
        ({"train_batch_size_per_device": 3}, {"eval_batch_size_per_device": 3}),
        (
            {"eval_batch_size_per_device": 5},
            {"train_batch_size_per_device": None, "eval_batch_size_per_device": 5},
        ),
    ],
)
def test_a_default_follows_from_what_is_given(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = _effective(**changes)
    assert {key: getattr(spec, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "nodes", "gpus", "world_size"),
    [
        ({}, 1, 1, 1),
        ({"num_devices": 4}, 1, 4, 4),
        ({"num_devices": 16}, 2, 8, 16),
        ({"num_devices": 6, "workers": {"nodes": 3}}, 3, 2, 6),
        ({"num_devices": 6, "workers": {"gpusPerNode": 2}}, 3, 2, 6),
        ({"num_devices": 6, "workers": {"nodes": 3, "gpusPerNode": 2}}, 3, 2, 6),
        ({"workers": {"nodes": 2, "gpusPerNode": 0}}, 2, 0, 2),
    ],
)
def test_num_devices_and_workers_say_the_same(changes: dict[str, Any], nodes: int, gpus: int, world_size: int) -> None:
    workers = _effective(**changes).workers
    assert (workers.nodes, workers.gpus_per_node, workers.world_size) == (nodes, gpus, world_size)


def test_old_spellings_are_replaced() -> None:
    spec = _effective(checkpoint_every_n_epochs=3, output_dir="/results")
    assert spec.checkpoint_and_evaluation_frequency == CheckpointFrequency(strategy="epochs", value=3)
    assert spec.output is not None
    assert spec.output.uri == "/results"
    assert (spec.checkpoint_every_n_epochs, spec.output_dir) == (None, None)


def test_a_native_model_gets_its_published_format() -> None:
    assert _effective(model_id=LLAMA.upper()).generation_config == native_generation_config(LLAMA)


def test_what_is_given_of_generation_config_stays() -> None:
    native = native_generation_config(LLAMA)
    assert native is not None
    partly = _effective(generation_config={"stopping_sequences": ["END"]}).generation_config
    assert partly is not None
    assert (partly.prompt_format, partly.stopping_sequences) == (native.prompt_format, ["END"])
    own = _effective(generation_config={"prompt_format": FORMAT}).generation_config
    assert own is not None
    assert isinstance(own.prompt_format, PromptFormat)
    assert own.prompt_format.user == "{instruction}"
    assert own.stopping_sequences == []


_CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "num_epochs": st.integers(1, 5),
        "min_num_update_steps": st.integers(1, 500),
        "context_length": st.integers(8, 9000),
        "train_batch_size_per_device": st.integers(1, 8),
        "no_gradient_checkpoint": st.booleans(),
        "checkpoint_every_n_epochs": st.integers(1, 9),
        "num_devices": st.sampled_from([1, 2, 8, 16, 64]),
        "output_dir": st.just("/results"),
        "deepspeed": st.just({"config_path": "x"}),
        "initial_adapter_model_ckpt_path": st.sampled_from(["s3://example-bucket/a", {"repo_id": "a/b"}]),
        "generation_config": st.sampled_from(
            [
                {"prompt_format": FORMAT},
                {"stopping_tokens": [1]},
                {"prompt_format": {"use_hugging_face_chat_template": True}},
            ]
        ),
        "secrets": st.just({"huggingFace": {"name": "hf"}}),
        "lora_config": st.sampled_from([{}, {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}]),
    },
)


@given(_CHANGES)
def test_filling_in_twice_changes_nothing(changes: dict[str, Any]) -> None:
    given_job = job(**changes)
    before = given_job.model_dump()
    once = effective_job(given_job)
    assert given_job.model_dump() == before
    assert effective_job(once) == once
    assert FineTuneJob.model_validate_json(once.model_dump_json(exclude_none=True)) == once


@given(_CHANGES)
def test_an_effective_job_is_a_job_that_is_accepted(changes: dict[str, Any]) -> None:
    effective = effective_job(job(**changes))
    result = load_manifest(effective.model_dump(exclude_none=True))
    assert result.errors == []
    assert result.job == effective


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({}, []),
        ({"num_epochs": 1, "min_update_steps": 5}, ["min_update_steps"]),
        ({"generation_config": {"generate_kwargs": {"temperature": 1}}}, ["generation_config.generate_kwargs"]),
        ({"eval_first": True}, ["eval_first"]),
        ({"valid_path": "data/train.jsonl"}, ["valid_path"]),
        ({"num_devices": 8}, ["num_devices"]),
        ({"num_devices": 8, "workers": {"nodes": 1}}, []),
        (
            {"model_id": "/models/x", "model_revision": "main", "generation_config": {"prompt_format": FORMAT}},
            ["model_revision"],
        ),
        (
            {"generation_config": {"prompt_format": FORMAT | {"assistant": "{instruction}"}}},
            ["generation_config.prompt_format"],
        ),
    ],
)
def test_a_notice_names_what_may_surprise(changes: dict[str, Any], paths: list[str]) -> None:
    assert [notice.path for notice in notices(job(**changes))] == paths


def test_a_job_that_leaves_out_task_and_lora_config_is_told_what_that_means() -> None:
    bare = manifest()
    del bare["spec"]["task"], bare["spec"]["lora_config"]
    found = {warning.path: warning.message for warning in load_manifest(bare).warnings}
    assert found.keys() == {"spec.task", "spec.lora_config"}
    assert "LLMForge's custom mode used causal_lm" in found["spec.task"]
    assert "LLMForge's custom mode trained all parameters" in found["spec.lora_config"]


@pytest.mark.parametrize("name", ["llama-guard-2", "mixtral-8x7b-lora", "gemma-2-27b-custom", "llama-3-8b-full"])
def test_llmforges_configurations_have_an_effective_job(name: str) -> None:
    result = load_job_file(Path(__file__).parent / "llmforge_yamls" / f"{name}.yaml")
    assert result.job is not None
    once = effective_job(result.job)
    assert effective_job(once) == once
