"""The fate of every key LLMForge had: acted on, accepted without effect, or refused. Nothing is ignored in silence.

The sentences here are what users read, in `finetune validate`, in events and in the CRD's own refusals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from finetune_api.accelerators import resources_without_effect
from finetune_api.job import FineTuneJobSpec
from finetune_api.problem import Problem


class Fate(StrEnum):
    """What becomes of a key."""

    ACTED_ON = "acted on"
    NO_EFFECT = "accepted with a warning"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class KeyFate:
    """What becomes of one key, and the sentence about it."""

    fate: Fate
    sentence: str


_ACTED_ON = {
    "model_id": "The model to fine-tune.",
    "train_path": "The training data.",
    "valid_path": "The validation data.",
    "task": "instruction_tuning and causal_lm are trained; classification and preference_tuning are refused.",
    "generation_config": "Prompt format and stops, written into the adapter as well.",
    "context_length": "Longer rows are cut and counted.",
    "num_devices": "The number of processes: workers.nodes x workers.gpusPerNode.",
    "num_epochs": "Passes over the data.",
    "min_update_steps": "Decides num_epochs when that is absent.",
    "min_num_update_steps": "Another spelling of min_update_steps.",
    "train_batch_size_per_device": "Rows per device and accumulated step.",
    "eval_batch_size_per_device": "Validation rows per device and forward pass.",
    "gradient_accumulation_steps": "Batches per device and optimizer step.",
    "learning_rate": "The highest learning rate.",
    "lr_scheduler_type": "cosine, linear or constant.",
    "num_warmup_steps": "Optimizer steps of warm-up.",
    "padding": "longest or max_length.",
    "gradient_checkpointing": "Activations are computed again in the backward pass.",
    "no_gradient_checkpoint": "The old, inverted spelling of gradient_checkpointing.",
    "lora_config": "PEFT's LoraConfig; parts of it that no server could load are refused.",
    "initial_base_model_ckpt_path": "Base weights from elsewhere.",
    "initial_adapter_model_ckpt_path": "An adapter whose training goes on.",
    "checkpoint_and_evaluation_frequency": "When to evaluate and save.",
    "checkpoint_every_n_epochs": "The old spelling of checkpoint_and_evaluation_frequency.",
    "max_num_checkpoints": "The most evaluations with a checkpoint.",
    "num_checkpoints_to_keep": "How many checkpoints stay.",
    "output_dir": "LLMForge's spelling of output.uri.",
    "logger": "wandb or mlflow, one run over all attempts; tensorboard is new.",
    "eval_first": "An evaluation before the first step.",
    "worker_resources": "An accelerator_type chooses the machines, in a cluster whose operator has a node selector for "
    "it; a notice names every other key as without effect.",
}

_NO_EFFECT = {
    "deepspeed": "deepspeed has no effect here: models that do not fit one GPU are sharded with PyTorch's FSDP, which "
    "`sharding: auto` turns on when needed; remove the key, or write `sharding: fsdp` to ask for it.",
    "trainer_resources": "trainer_resources has no effect here: all workers are alike, and checkpoints of an adapter "
    "need no gathering; give memory with workers.resources.",
    "flash_attention_2": "flash_attention_2 has no effect here: the fastest attention kernel that the device and the "
    "model support is chosen at start; remove the key.",
    "liger_kernel": "liger_kernel has no effect here: its fused loss skips the adapter on some models, so PyTorch's "
    "own kernels are used; remove the key.",
    "num_data_blocks_per_device": "num_data_blocks_per_device has no effect here: it cut the data for Ray, while here "
    "rows are tokenized once into files that every worker maps; remove the key.",
    "dataset_size_scaling_factor": "dataset_size_scaling_factor has no effect here: it was an internal flag of "
    "LLMForge; shorten the file behind train_path to train on less.",
    "custom_model_tag": "custom_model_tag has no effect here: the adapter is found by the job's metadata.name and the "
    "address in status.adapter; choose the name there.",
    "forward_checkpoint_config": "forward_checkpoint_config has no effect here: the adapter is written to output.uri "
    "and nowhere else; put the address there.",
}

REFUSED = {
    "classifier_config": "classifier_config is not supported: remove it, write each label as the assistant's message, "
    "and train with `task: instruction_tuning`, whose loss falls on the label alone.",
    "preference_tuning_config": "preference_tuning_config is not supported, only supervised fine-tuning is: remove it, "
    "and train on the chosen answers with `task: instruction_tuning`.",
}
"""Keys for jobs of other kinds, with why there are none."""

KEYS: dict[str, KeyFate] = {
    **{key: KeyFate(Fate.ACTED_ON, sentence) for key, sentence in _ACTED_ON.items()},
    **{key: KeyFate(Fate.NO_EFFECT, sentence) for key, sentence in _NO_EFFECT.items()},
    **{key: KeyFate(Fate.REFUSED, sentence) for key, sentence in REFUSED.items()},
}
"""Every top-level key of LLMForge's configuration."""

REFUSED_TASKS = {
    "classification": "task: classification is not supported: write each label as the assistant's message and use "
    "`task: instruction_tuning`, whose loss falls on the label alone.",
    "preference_tuning": "task: preference_tuning is not supported, only supervised fine-tuning is: train on the "
    "chosen answers with `task: instruction_tuning`.",
}

FULL_PARAMETER_REFUSAL = (
    "lora_config: null asks for full-parameter training, which is not supported: remove the line to train a LoRA "
    "adapter with the defaults (r 8, lora_alpha 16, all linear layers), or write the lora_config you want."
)

NO_LORA_CONFIG_NOTICE = (
    "No lora_config is given, so a LoRA adapter is trained with the defaults (r 8, lora_alpha 16, lora_dropout 0.05, "
    "all linear layers); LLMForge's custom mode trained all parameters then, which is not supported here."
)

NO_TASK_NOTICE = (
    "No task is given, so `task: instruction_tuning` is used (loss on the assistant only); LLMForge's custom mode "
    "used causal_lm then (loss on every token): write the one you mean."
)

GENERATE_KWARGS_NOTICE = (
    "generate_kwargs has no effect on training: set sampling in the requests to your server, or in the "
    "generation_config.json of the model it serves."
)

_SERVED_NOWHERE = "which no common server can load with an adapter"
_BASE_WEIGHTS = "which starts from changed base weights, so the adapter would not fit the published model"

REFUSED_PEFT_KEYS = {
    "alora_invocation_tokens": f"it makes an activated LoRA, {_SERVED_NOWHERE}",
    "arrow_config": f"it routes between several adapters, {_SERVED_NOWHERE}",
    "auto_mapping": "PEFT writes it by itself",
    "base_model_name_or_path": "it is written from model_id",
    "corda_config": f"it belongs to CorDA, {_BASE_WEIGHTS}",
    "ensure_weight_tying": "embedding and output head that share their weights are left as they are here",
    "eva_config": "EVA's data-driven start is not supported; leave init_lora_weights at true",
    "kasa_config": f"it makes a KaSA adapter, {_SERVED_NOWHERE}",
    "layer_replication": "it changes the number of layers, so the adapter would not fit the published model",
    "loftq_config": f"it belongs to LoftQ, {_BASE_WEIGHTS}",
    "lora_bias": f"it adds biases to the adapter, {_SERVED_NOWHERE}",
    "lora_ga_config": f"it belongs to LoRA-GA, {_BASE_WEIGHTS}",
    "megatron_config": "models are loaded with Transformers, not Megatron",
    "megatron_core": "models are loaded with Transformers, not Megatron",
    "monteclora_config": f"it makes a Monte Carlo LoRA, {_SERVED_NOWHERE}",
    "peft_type": "only LORA is trained",
    "peft_version": "PEFT writes it by itself",
    "qalora_group_size": f"it belongs to QA-LoRA, {_SERVED_NOWHERE}",
    "revision": "write model_revision beside model_id",
    "runtime_config": "it concerns LoftQ and DoRA, which are not supported",
    "target_parameters": "write experts: true to adapt the parameters of a mixture's experts",
    "trainable_token_indices": f"it trains single embeddings, {_SERVED_NOWHERE}",
    "use_bdlora": f"it makes a block-diagonal LoRA, {_SERVED_NOWHERE}",
    "use_qalora": f"it makes a QA-LoRA, {_SERVED_NOWHERE}",
    "velora_config": "VeLoRA is not supported; gradient_checkpointing saves memory instead",
}
"""Keys of PEFT's LoraConfig that `LoraConfig` does not have: why, as the end of a sentence."""


def refused_keys(spec: FineTuneJobSpec) -> Iterator[Problem]:
    """A sentence for each refused key and task in `spec`."""
    for key, sentence in REFUSED.items():
        if getattr(spec, key) is not None:
            yield Problem(key, sentence)
    if spec.task in REFUSED_TASKS:
        yield Problem("task", REFUSED_TASKS[spec.task])


def keys_without_effect(spec: FineTuneJobSpec) -> Iterator[Problem]:
    """A sentence for each key in `spec` that does nothing here."""
    for key, sentence in _NO_EFFECT.items():
        if getattr(spec, key) is not None:
            yield Problem(key, sentence)
    yield from resources_without_effect(spec.worker_resources)
