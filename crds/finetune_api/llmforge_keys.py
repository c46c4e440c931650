"""LLMForge's keys that are read but not kept: old spellings, keys without effect, and keys that are refused.

They are part of the schema, because a key that the API server does not know gets no sentence of ours.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.fields import Amount, Count, FreeObject, SpecModel


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
    trainer_resources: FreeObject | None = Field(
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
    forward_checkpoint_config: FreeObject | None = Field(
        default=None,
        description="forward_checkpoint_config is accepted with a warning and has no effect: use output.uri.",
    )


class Refused(SpecModel):
    """LLMForge's keys for jobs that are not done here: known, so that the refusal can say why."""

    classifier_config: FreeObject | None = Field(
        default=None,
        description="classifier_config is refused: write the labels as assistant messages and use instruction_tuning.",
    )
    preference_tuning_config: FreeObject | None = Field(
        default=None,
        description="preference_tuning_config is refused: only supervised fine-tuning is done.",
    )
