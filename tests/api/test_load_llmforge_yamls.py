"""Configurations in the shape of LLMForge's public templates, and the verdict on each."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.load import load_job_file

FOLDER = Path(__file__).parent / "llmforge_yamls"

# File -> paths of its warnings in order. These are trained.
ACCEPTED = {
    "llama-3-8b-lora-default.yaml": ["task", "lora_config"],
    "llama-guard-2.yaml": [
        "deepspeed",
        "trainer_resources",
        "flash_attention_2",
        "worker_resources",
        "num_devices",
        "lora_config.target_modules",
    ],
    "llama-3-8b-lora-custom.yaml": ["task", "num_devices", "lora_config.target_modules"],
    "mixtral-8x7b-lora.yaml": [
        "num_data_blocks_per_device",
        "num_devices",
        "no_gradient_checkpoint",
        "checkpoint_every_n_epochs",
    ],
    "gemma-2-27b-custom.yaml": ["liger_kernel", "worker_resources", "num_devices"],
    "llama-3-8b-full.yaml": [
        "dataset_size_scaling_factor",
        "forward_checkpoint_config",
        "lora_config",
        "num_devices",
    ],
}

# File -> (path, part of the sentence) of each error.
REFUSED = {
    "llama-3-8b-full-explicit.yaml": [("lora_config", "full-parameter training, which is not supported")],
    "dpo.yaml": [
        ("preference_tuning_config", "only supervised fine-tuning is"),
        ("task", "only supervised fine-tuning is"),
    ],
    "classifier.yaml": [("classifier_config", "write each label as the assistant's message")],
    "no-format.yaml": [
        ("generation_config", "use_hugging_face_chat_template: true"),
        ("train_path", "s3://bucket/key, hf://datasets"),
    ],
}


def test_every_yaml_has_a_verdict() -> None:
    assert {path.name for path in FOLDER.iterdir()} == ACCEPTED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_configuration_is_accepted_with_its_notices(name: str) -> None:
    result = load_job_file(FOLDER / name)
    assert result.errors == []
    assert [warning.path for warning in result.warnings] == ACCEPTED[name]
    assert result.job is not None
    assert result.job.metadata.name == name.removesuffix(".yaml")


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_is_refused_with_what_to_write_instead(name: str) -> None:
    result = load_job_file(FOLDER / name)
    assert result.job is None
    assert [error.path for error in result.errors] == [path for path, _ in REFUSED[name]]
    for error, (_, part) in zip(result.errors, REFUSED[name], strict=True):
        assert part in error.message
