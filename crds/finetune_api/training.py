"""What to train: the spec's keys as LLMForge spelled them, and the few that we add in the same spelling.

The keys of this module are immutable in a cluster: another value is another job.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from finetune_api.fields import Address, Amount, Count, Share, SpecModel, Word
from finetune_api.generation import GenerationConfig
from finetune_api.llmforge_keys import OldSpellings
from finetune_api.lora import LoraConfig
from finetune_api.untyped import NO_BOOLEAN, NO_LIST, NO_NUMBER, UNTYPED, FreeObject, one_of_several

DEFAULT_MIN_UPDATE_STEPS = 100
"""LLMForge's: how many optimizer steps a job without num_epochs makes at least."""

DEFAULT_WARMUP_STEPS = 10
"""LLMForge's, in runs that are long enough."""

DEFAULT_SAVES = 20
"""About how many evaluations and checkpoints a job without a frequency has at most."""

DEFAULT_TOKENS_PER_STEP = 8192
"""Tokens per device and optimizer step that a job without a batch size aims at: more fill a GPU no better."""

MOST_DEFAULT_ROWS = 16
"""Rows per device that a job without a batch size has at most: the gradient of more is hardly a better one, and short
rows would leave few steps. Ours, as the other: LLMForge's own table was never public."""


Quantization = Literal["nf4", "int8"]
"""How the weights of linear layers are kept: 4-bit normal floats, or 8-bit whole numbers with a scale per row."""


class CheckpointFrequency(SpecModel):
    """How often the model is evaluated and saved, always together."""

    strategy: Literal["epochs", "steps"] = Field(
        default="epochs", description="strategy is the unit of value: epochs or optimizer steps. Default: epochs."
    )
    value: Count = Field(default=1, description="value is the number of epochs or steps in between. Default: 1.")


class Logger(SpecModel):
    """An experiment tracker."""

    provider: Literal["wandb", "mlflow", "tensorboard"] = Field(
        description="provider is wandb, mlflow or tensorboard. wandb reads its key from WANDB_API_KEY: give it with "
        "workers.env and valueFrom.secretKeyRef. The files of tensorboard are at the output, in tensorboard/."
    )
    provider_config: FreeObject = Field(
        default_factory=dict,
        description="provider_config is what the provider takes. mlflow: tracking_uri, experiment_name, "
        "create_experiment_if_not_exists, artifact_location, run_name, tags, description. wandb: project, entity, "
        "group, tags, name, notes, job_type, config, id, base_url, mode, dir. tensorboard: logging_dir, a folder "
        "beside the output. Default: {}.",
    )


class HubRepository(SpecModel):
    """A repository on the Hugging Face hub."""

    repo_id: Word = Field(description="repo_id is the repository, as owner/name.")
    revision: Word | None = Field(
        default=None, description="revision is a branch, tag or commit. Default: the main branch."
    )


WeightsSource = Annotated[
    Address | HubRepository,
    one_of_several("a path, an s3:// address, or {repo_id: owner/name}"),
    WithJsonSchema(
        {
            **UNTYPED,
            "minLength": 1,
            "maxLength": 2048,
            **NO_NUMBER,
            **NO_BOOLEAN,
            **NO_LIST,
            "maxProperties": 2,
            "additionalProperties": {"type": "string", "minLength": 1, "maxLength": 256},
            # Where types are left out, named properties would let others through, with anything in them.
            "anyOf": [{"required": ["repo_id"], "maxProperties": 1}, {"required": ["repo_id", "revision"]}],
        }
    ),
]
"""Weights to start from."""


class ModelAndData(SpecModel):
    """Which model, on which rows, written how."""

    model_id: Address = Field(
        description="model_id is the model to fine-tune: a Hugging Face id (owner/name), a local folder, or an s3:// "
        "or pvc:// address of a folder in Hugging Face's layout. Any causal language model. At most 2048 characters."
    )
    model_revision: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None,
        description="model_revision pins a branch, tag or commit of a hub model. Default: the main branch; the commit "
        "that was used is written to status.adapter.baseModelRevision.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="trust_remote_code runs the Python code that a model's repository brings. Default: false.",
    )
    initial_base_model_ckpt_path: WeightsSource | None = Field(
        default=None,
        description="initial_base_model_ckpt_path is where the base weights come from when not from model_id: a path, "
        "an s3:// address, or {repo_id: owner/name}. The tokenizer comes with them, the prompt format stays that of "
        "model_id. Default: model_id.",
    )
    initial_adapter_model_ckpt_path: WeightsSource | None = Field(
        default=None,
        description="initial_adapter_model_ckpt_path is a LoRA adapter whose training goes on as a new run: a path, an "
        "s3:// address, or {repo_id: owner/name}. Default: a fresh adapter.",
    )
    train_path: Address = Field(
        description="train_path is the training data, a JSONL file with one {messages: [{role, content}, ...]} per "
        "line: a local path, s3://, pvc:// or hf://datasets/owner/name/file. At most 2048 characters."
    )
    valid_path: Address | None = Field(
        default=None,
        description="valid_path is the validation data, as train_path. Without it nothing is evaluated and the last "
        "checkpoint counts as the best. Default: none.",
    )
    task: Literal["instruction_tuning", "causal_lm", "classification", "preference_tuning"] = Field(
        default="instruction_tuning",
        description="task says what the loss falls on: instruction_tuning (what the assistant must produce) or "
        "causal_lm (every token). classification and preference_tuning are refused. Default: instruction_tuning; "
        "LLMForge's custom mode had causal_lm.",
    )
    generation_config: GenerationConfig | None = Field(
        default=None,
        description="generation_config declares how conversations become text, in training and at inference alike. "
        "Default: the published format of natively supported models; required for all others.",
    )
    context_length: int | None = Field(
        default=None,
        ge=8,
        le=4_194_304,
        description="context_length is the most tokens a row may have; longer rows are cut at the end and counted. 8 "
        "to 4194304, at most what the model supports. Default: the model's own context length, or the longest row "
        "where that is shorter.",
    )
    max_invalid_row_share: Share = Field(
        default=0.0,
        description="max_invalid_row_share is the share of rows that may be malformed before the job fails, 0 to 1; "
        "malformed rows are left out and counted. Default: 0.",
    )
    max_dropped_row_share: Share = Field(
        default=0.1,
        description="max_dropped_row_share is the share of rows that may be left without a trainable token by "
        "context_length before the job fails, 0 to 1. Default: 0.1.",
    )
    max_truncated_row_share: Share = Field(
        default=1.0,
        description="max_truncated_row_share is the share of rows that may lose their end to context_length before the "
        "job fails, 0 to 1; they are counted. Default: 1.",
    )


class Schedule(SpecModel):
    """How long and how fast."""

    num_epochs: Count | None = Field(
        default=None,
        description="num_epochs is the number of passes over the training data, at least 1. Default: as many as it "
        "takes to reach min_update_steps.",
    )
    min_update_steps: Count | None = Field(
        default=None,
        description="min_update_steps is the least number of optimizer steps of a job without num_epochs: num_epochs "
        "is then min_update_steps / steps per epoch, rounded up. Default: 100.",
    )
    train_batch_size_per_device: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="train_batch_size_per_device times gradient_accumulation_steps is the number of rows per device of "
        "an optimizer step. Default: a power of two by the training data, so that a device gets about "
        f"{DEFAULT_TOKENS_PER_STEP} tokens per step, 1 to {MOST_DEFAULT_ROWS}.",
    )
    eval_batch_size_per_device: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="eval_batch_size_per_device is the number of validation rows per device and forward pass. "
        "Default: train_batch_size_per_device.",
    )
    gradient_accumulation_steps: int = Field(
        default=1,
        ge=1,
        le=65536,
        description="gradient_accumulation_steps multiplies the rows of an optimizer step; how many rows go through "
        "the model at once follows from memory. Default: 1.",
    )
    learning_rate: Amount = Field(
        default=1e-4,
        gt=0,
        le=10,
        description="learning_rate is the highest learning rate of AdamW, above 0 and at most 10. Default: 1e-4.",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="lr_scheduler_type is how the learning rate falls after the warm-up: cosine, linear or constant. "
        "Default: cosine.",
    )
    num_warmup_steps: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="num_warmup_steps is the number of optimizer steps in which the learning rate rises to its highest "
        "value; it is capped below the number of steps of the run. Default: 10, in runs below 100 steps a tenth of "
        "them.",
    )
    weight_decay: Amount = Field(
        default=0.0, ge=0, le=10, description="weight_decay is AdamW's decoupled weight decay, 0 to 10. Default: 0."
    )
    max_grad_norm: Amount = Field(
        default=1.0,
        ge=0,
        le=1e9,
        description="max_grad_norm is the norm that gradients are clipped to; 0 clips nothing. Default: 1.",
    )
    seed: int = Field(
        default=42, ge=0, le=2**32 - 1, description="seed of the order of rows, dropout and adapter. Default: 42."
    )


class Method(SpecModel):
    """The adapter, and how the work is laid out on devices."""

    lora_config: LoraConfig = Field(
        default_factory=LoraConfig,
        description="lora_config is PEFT's LoraConfig. Default: r 8, lora_alpha 16, lora_dropout 0.05 on all linear "
        "layers except the output head. Full-parameter training, which LLMForge did without this key, is not done.",
    )
    quantization: Quantization | None = Field(
        default=None,
        description="quantization keeps the linear layers of the frozen base model in 4 bits (nf4, as QLoRA does) or 8 "
        "bits (int8) in memory; the adapter and what is computed stay as they are. An adapter answers "
        "as trained on the same quantization of its base model. Embeddings, output head and the stacked experts of "
        "mixtures are not quantized. Not with sharding: fsdp. Default: none, the base model is held in bfloat16.",
    )
    padding: Literal["longest", "max_length"] = Field(
        default="longest",
        description="padding fills rows that cannot be packed up to the longest of a batch (longest). max_length turns "
        "packing off and fills all rows up to context_length, to see the worst case's memory. Default: longest.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="gradient_checkpointing computes activations again in the backward pass, which saves memory and "
        "costs about a third more time. Default: where memory asks for it, in every fourth, every second or all "
        "layers.",
    )
    sharding: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="sharding is ddp (every process holds the model), fsdp (the processes share it) or auto (ddp when "
        "the model fits one device). Default: auto.",
    )


class Saving(SpecModel):
    """Checkpoints, evaluation and trackers."""

    checkpoint_and_evaluation_frequency: CheckpointFrequency | None = Field(
        default=None,
        description="checkpoint_and_evaluation_frequency is how often the model is evaluated and saved, always "
        "together; the end of training always is. Default: every epoch, in runs of more than 20 epochs every second, "
        "third and so on, so that there are at most 20.",
    )
    max_num_checkpoints: Count | None = Field(
        default=None,
        description="max_num_checkpoints is the most evaluations with a checkpoint over the whole run; they are "
        "spread evenly when the frequency asks for more. Default: no bound.",
    )
    num_checkpoints_to_keep: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="num_checkpoints_to_keep is the number of checkpoints kept: those of the lowest validation loss, "
        "and always the newest, to resume from. 1 to 1000. Default: 1.",
    )
    eval_first: bool = Field(
        default=False, description="eval_first evaluates once before the first optimizer step. Default: false."
    )
    output_dir: Address | None = Field(
        default=None,
        description="output_dir is LLMForge's spelling of output.uri; only one of the two is given. Default: none.",
    )
    logger: Logger | None = Field(
        default=None,
        description="logger sends metrics to Weights & Biases, MLflow or TensorBoard as well. Default: none.",
    )


class WhatToTrain(OldSpellings, Saving, Method, Schedule, ModelAndData):
    """Everything that decides what adapter comes out."""
