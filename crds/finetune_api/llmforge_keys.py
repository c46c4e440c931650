"""LLMForge's keys that are read but not kept: old spellings, keys without effect, and keys that are refused.

They are part of the schema, because a key that the API server does not know gets no sentence of ours.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.fields import Amount, Count, SpecModel, Word
from finetune_api.untyped import FlatObject, FreeObject


class OldSpellings(SpecModel):
    """LLMForge's older names of keys above. `effective_job` rewrites them."""

    min_num_update_steps: Count | None = Field(
        default=None, description="min_num_update_steps is another spelling of min_update_steps."
    )
    no_gradient_checkpoint: bool | None = Field(
        default=None, description="no_gradient_checkpoint is the old, inverted spelling of gradient_checkpointing."
    )
    checkpoint_every_n_epochs: Count | None = Field(
        default=None,
        description="checkpoint_every_n_epochs: n is the old spelling of checkpoint_and_evaluation_frequency: "
        "{strategy: epochs, value: n}.",
    )


class WithoutEffect(SpecModel):
    """LLMForge's keys for machinery that is not here. They are accepted, and a notice says what acts instead."""

    deepspeed: FreeObject | None = Field(
        default=None, description="deepspeed is accepted with a warning and has no effect: use sharding."
    )
    trainer_resources: FlatObject | None = Field(
        default=None, description="trainer_resources is accepted with a warning and has no effect: use workers."
    )
    flash_attention_2: bool | None = Field(
        default=None,
        description="flash_attention_2 is accepted with a warning and has no effect: the attention kernel is chosen "
        "for the device.",
    )
    liger_kernel: FreeObject | None = Field(
        default=None, description="liger_kernel is accepted with a warning and has no effect."
    )
    num_data_blocks_per_device: Count | None = Field(
        default=None, description="num_data_blocks_per_device is accepted with a warning and has no effect."
    )
    dataset_size_scaling_factor: Amount | None = Field(
        default=None, description="dataset_size_scaling_factor is accepted with a warning and has no effect."
    )
    custom_model_tag: Annotated[str, Field(max_length=512)] | None = Field(
        default=None,
        description="custom_model_tag is accepted with a warning and has no effect: the job's name names the adapter.",
    )
    forward_checkpoint_config: FlatObject | None = Field(
        default=None,
        description="forward_checkpoint_config is accepted with a warning and has no effect: use output.uri.",
    )


class ClassifierConfig(SpecModel):
    """LLMForge's, as far as it was documented: with types of its own, so that the API server's refusal can say why."""

    label_tokens: Annotated[list[Word], Field(max_length=1024)] | None = Field(
        default=None, description="label_tokens are the texts of the classes."
    )
    eval_metrics: Annotated[list[Word], Field(max_length=64)] | None = Field(
        default=None, description="eval_metrics are figures of the validation, such as accuracy."
    )


class LogprobProcessorScaling(SpecModel):
    """LLMForge's."""

    custom_resources: FlatObject | None = Field(
        default=None, description="custom_resources are Ray's, for each process."
    )
    concurrency: Count | None = Field(default=None, description="concurrency is the number of processes.")
    batch_size: Count | None = Field(default=None, description="batch_size is the number of rows of a process.")


class PreferenceTuningConfig(SpecModel):
    """LLMForge's, as `ClassifierConfig`."""

    beta: Amount | None = Field(default=None, description="beta is DPO's.")
    logprob_processor_scaling_config: LogprobProcessorScaling | None = Field(
        default=None,
        description="logprob_processor_scaling_config is about the processes that compute reference probabilities.",
    )


class Refused(SpecModel):
    """LLMForge's keys for jobs that are not done here: known, so that the refusal can say why."""

    classifier_config: ClassifierConfig | None = Field(
        default=None,
        description="classifier_config is refused: write the labels as assistant messages and use instruction_tuning.",
    )
    preference_tuning_config: PreferenceTuningConfig | None = Field(
        default=None,
        description="preference_tuning_config is refused: only supervised fine-tuning is done.",
    )
