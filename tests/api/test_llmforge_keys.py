"""Every key that LLMForge had is acted on, named in a warning, or refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest

from finetune_api.fields import SpecModel
from finetune_api.job import FineTuneJobSpec
from finetune_api.llmforge import KEYS, REFUSED_PEFT_KEYS, Fate
from finetune_api.load import load_manifest
from finetune_api.lora import LoraConfig
from tests.api.jobs import job, manifest

# Every key found in LLMForge's reference, templates, cookbooks and release notes.
_LLMFORGE_KEYS = """
    model_id train_path valid_path task generation_config context_length num_devices worker_resources trainer_resources
    num_epochs min_update_steps min_num_update_steps train_batch_size_per_device eval_batch_size_per_device
    gradient_accumulation_steps learning_rate lr_scheduler_type num_warmup_steps padding gradient_checkpointing
    no_gradient_checkpoint flash_attention_2 deepspeed liger_kernel lora_config initial_base_model_ckpt_path
    initial_adapter_model_ckpt_path checkpoint_and_evaluation_frequency checkpoint_every_n_epochs max_num_checkpoints
    num_checkpoints_to_keep output_dir logger classifier_config preference_tuning_config num_data_blocks_per_device
    dataset_size_scaling_factor custom_model_tag eval_first forward_checkpoint_config
"""

WITHOUT_EFFECT: dict[str, Any] = {
    "deepspeed": {"config_path": "zero_3.json"},
    "trainer_resources": {"memory": 53687091200},
    "flash_attention_2": False,
    "liger_kernel": {"enabled": True},
    "num_data_blocks_per_device": 32,
    "dataset_size_scaling_factor": 10000,
    "custom_model_tag": "mine",
    "forward_checkpoint_config": {"tag": "x", "remote_uri": "s3://example-bucket/x"},
}


def test_every_key_has_a_fate_and_a_field() -> None:
    assert set(KEYS) == set(_LLMFORGE_KEYS.split())
    assert set(KEYS) <= set(FineTuneJobSpec.model_fields)


def test_every_key_without_effect_is_tested() -> None:
    assert {key for key, fate in KEYS.items() if fate.fate is Fate.NO_EFFECT} == set(WITHOUT_EFFECT)


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_key_without_effect_is_accepted_and_named(key: str) -> None:
    result = load_manifest(manifest(**{key: WITHOUT_EFFECT[key]}))
    assert result.errors == []
    (warning,) = result.warnings
    assert warning.path == f"spec.{key}"
    assert warning.message.startswith(f"{key} has no effect here: ")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"classifier_config": {"label_tokens": ["a"]}}, "spec.classifier_config"),
        ({"preference_tuning_config": {"beta": 0.1}}, "spec.preference_tuning_config"),
        ({"task": "classification"}, "spec.task"),
        ({"task": "preference_tuning"}, "spec.task"),
        ({"lora_config": None}, "spec.lora_config"),
    ],
)
def test_a_job_of_another_kind_is_refused_with_a_way_out(changes: dict[str, Any], path: str) -> None:
    (problem,) = load_manifest(manifest(**changes)).errors
    assert problem.path == path
    assert "not supported" in problem.message
    assert any(verb in problem.message for verb in ("write", "train on", "remove"))


@pytest.mark.parametrize(
    ("lora_config", "key", "part"),
    [
        ({"use_dora": True}, "use_dora", "vLLM serves no DoRA"),
        ({"bias": "all"}, "bias", "must be none"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "must be empty"),
        ({"task_type": "SEQ_CLS"}, "task_type", "must be CAUSAL_LM"),
        ({"inference_mode": True}, "inference_mode", "would train nothing"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights", "write true or gaussian"),
        ({"target_modules": ["all-linear"]}, "target_modules", "write target_modules: all-linear"),
        ({"target_modules": "q_proj("}, "target_modules", "is not a regular expression"),
        ({"exclude_modules": "*"}, "exclude_modules", "is not a regular expression"),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform", "needs target_modules as a list"),
        ({"layers_pattern": "layers"}, "layers_pattern", "only with layers_to_transform"),
    ],
)
def test_an_adapter_that_nothing_could_serve_is_refused(lora_config: dict[str, Any], key: str, part: str) -> None:
    (problem,) = load_manifest(manifest(lora_config=lora_config)).errors
    assert problem.path == f"spec.lora_config.{key}"
    assert part in problem.message


@pytest.mark.parametrize(
    "lora_config",
    [
        {"target_modules": r".*\.(q|k|v|o)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["gate"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers"},
        {"init_lora_weights": "gaussian", "use_rslora": True, "fan_in_fan_out": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}},
        {"bias": "none", "modules_to_save": [], "task_type": "CAUSAL_LM", "inference_mode": False, "use_dora": False},
    ],
)
def test_an_adapter_that_can_be_served_is_accepted_without_a_word(lora_config: dict[str, Any]) -> None:
    result = load_manifest(manifest(lora_config=lora_config))
    assert (result.errors, result.warnings) == ([], [])


@pytest.mark.parametrize(
    ("lora_config", "key"),
    [
        ({"r": 64}, "r"),
        ({"init_lora_weights": False}, "init_lora_weights"),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, "target_modules"),
        ({"experts": True}, "experts"),
    ],
)
def test_an_adapter_that_needs_care_when_served_is_accepted_with_a_word(lora_config: dict[str, Any], key: str) -> None:
    result = load_manifest(manifest(lora_config=lora_config))
    assert result.errors == []
    assert [warning.path for warning in result.warnings] == [f"spec.lora_config.{key}"]


def test_no_key_is_both_a_field_and_refused() -> None:
    assert LoraConfig.model_fields.keys().isdisjoint(REFUSED_PEFT_KEYS)


def test_every_key_that_peft_knows_has_a_fate() -> None:
    known = set(peft.LoraConfig.__dataclass_fields__)
    assert known - LoraConfig.model_fields.keys() - REFUSED_PEFT_KEYS.keys() == set()


@pytest.mark.parametrize(
    ("changes", "path", "part"),
    [
        (
            {"no_gradient_checkpoint": True, "gradient_checkpointing": True},
            "no_gradient_checkpoint",
            "contradicts gradient_checkpointing: true",
        ),
        ({"min_update_steps": 5, "min_num_update_steps": 6}, "min_num_update_steps", "contradicts min_update_steps: 5"),
        (
            {"checkpoint_every_n_epochs": 2, "checkpoint_and_evaluation_frequency": {"strategy": "epochs", "value": 1}},
            "checkpoint_every_n_epochs",
            "contradicts",
        ),
        ({"output_dir": "a", "output": {"uri": "b"}}, "output_dir", "contradicts output.uri"),
        ({"quantization": "nf4", "sharding": "fsdp"}, "quantization", "does not go with sharding: fsdp"),
        ({"num_devices": 8, "workers": {"nodes": 3}}, "num_devices", "contradicts workers.nodes: 3"),
        ({"num_devices": 8, "workers": {"gpusPerNode": 0}}, "num_devices", "contradicts workers.gpusPerNode: 0"),
        (
            {"num_devices": 8, "workers": {"nodes": 2, "gpusPerNode": 2}},
            "num_devices",
            "contradicts workers.nodes: 2 x workers.gpusPerNode: 2",
        ),
        ({"num_devices": 12}, "num_devices", "does not divide into nodes of 8 GPUs"),
        ({"model_id": "nobody/unknown"}, "generation_config", "{instruction}"),
        (
            {"model_id": "nobody/unknown", "generation_config": {"stopping_tokens": [2]}},
            "generation_config.prompt_format",
            "use_hugging_face_chat_template: true",
        ),
        ({"model_id": "nobody/unknown", "task": "causal_lm"}, "generation_config", "is required"),
        ({"train_path": "gs://b/k"}, "train_path", "gs:// addresses are not read"),
        ({"valid_path": "s3://example-bucket"}, "valid_path", "names no file"),
        ({"model_id": f"hf://{'meta-llama/Llama-3.2-1B'}"}, "model_id", "write the model's name as owner/name"),
        ({"initial_base_model_ckpt_path": "hf://a/b"}, "initial_base_model_ckpt_path", "{repo_id: owner/name}"),
        ({"output": {"uri": "hf://datasets/a/b"}}, "output.uri", "write hf://owner/name"),
    ],
)
def test_a_contradiction_is_explained(changes: dict[str, Any], path: str, part: str) -> None:
    problems = {problem.path: problem.message for problem in load_manifest(manifest(**changes)).errors}
    assert part in problems[f"spec.{path}"]


_TOKEN = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"workers": {"env": [{"name": "HF_TOKEN", "value": "x"}]}}, "workers.env[0].value"),
        ({"workers": {"env": [{"name": "A", "value": "b"}, {"name": "X", "value": _TOKEN}]}}, "workers.env[1].value"),
        ({"workers": {"env": [{"name": "WANDB_API_KEY", "value": _TOKEN}]}}, "workers.env[0].value"),
        ({"workers": {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]}}, "workers.env[0].value"),
        ({"train_path": f"data/{_TOKEN}"}, "train_path"),
        ({"logger": {"provider": "wandb", "provider_config": {"key": _TOKEN}}}, "logger.provider_config.key"),
        (
            {"logger": {"provider": "mlflow", "provider_config": {"tracking_uri": "https://me:pw@example.org"}}},
            "logger.provider_config.tracking_uri",
        ),
        ({"deepspeed": {"x": [{"y": "AKIA" + "A1" * 8}]}}, "deepspeed.x[0].y"),
        ({"initial_base_model_ckpt_path": {"repo_id": _TOKEN}}, "initial_base_model_ckpt_path.repo_id"),
    ],
)
def test_a_secret_in_the_spec_is_refused_and_not_repeated(changes: dict[str, Any], path: str) -> None:
    (problem,) = load_manifest(manifest(**changes)).errors
    assert problem.path == f"spec.{path}"
    assert "secret" in problem.message.lower()
    assert _TOKEN not in problem.message
    assert "pw" not in problem.message


@pytest.mark.parametrize(
    "variable",
    [
        {"name": "TOKENIZERS_PARALLELISM", "value": "true"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
        {"name": "NCCL_DEBUG", "value": ""},
    ],
)
def test_an_ordinary_variable_is_accepted(variable: dict[str, Any]) -> None:
    assert len(job(workers={"env": [variable]}).spec.workers.env) == 1


@pytest.mark.parametrize(
    ("workers", "path"),
    [
        ({"env": [{"name": "A"}]}, "workers.env[0]"),
        ({"env": [{"name": "A", "value": "b", "valueFrom": {"fieldRef": {"fieldPath": "c"}}}]}, "workers.env[0]"),
        ({"env": [{"name": "A", "valueFrom": {}}]}, "workers.env[0].valueFrom"),
        ({"volumes": [{"name": "a", "mountPath": "/a"}]}, "workers.volumes[0]"),
        (
            {
                "volumes": [
                    {"name": "a", "mountPath": "/a", "emptyDir": {}},
                    {"name": "a", "mountPath": "/b", "emptyDir": {}},
                ]
            },
            "workers.volumes[1].name",
        ),
        ({"resources": {"limits": {"nvidia.com/gpu": 2}}}, "workers.resources.limits"),
    ],
)
def test_workers_that_no_pod_could_have_are_refused(workers: dict[str, Any], path: str) -> None:
    (problem,) = load_manifest(manifest(workers=workers)).errors
    assert problem.path == f"spec.{path}"


def test_every_model_of_the_spec_refuses_unknown_keys() -> None:
    assert all(model.model_config.get("extra") == "forbid" for model in _below(SpecModel))


def _below(model: type[SpecModel]) -> list[type[SpecModel]]:
    found = model.__subclasses__()
    return [model, *(inner for child in found for inner in _below(child))]


@pytest.mark.parametrize(("rank", "needed"), [(17, 32), (24, 32), (64, 64), (65, 128), (321, 512)])
def test_the_rank_that_vllm_is_to_be_started_with_is_one_that_it_takes(rank: int, needed: int) -> None:
    (warning,) = load_manifest(manifest(lora_config={"r": rank})).warnings
    assert f"--max-lora-rank {needed}." in warning.message
