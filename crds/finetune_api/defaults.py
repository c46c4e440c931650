"""A job with every default filled in that needs neither data nor tokenizer, and what its author should know about it.

The filled-in job is what is trained: the operator stores it beside each attempt, the trainer beside the adapter.
Both functions are pure, and filling in twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.accelerators import accelerator_notice
from finetune_api.job import FineTuneJob, FineTuneJobSpec, Output
from finetune_api.llmforge import GENERATE_KWARGS_NOTICE, NO_LORA_CONFIG_NOTICE, NO_TASK_NOTICE, keys_without_effect
from finetune_api.native_models import native_generation_config
from finetune_api.problem import Problem
from finetune_api.prompt_format import PromptFormat
from finetune_api.rules import workers_of
from finetune_api.rules_lora import lora_notices
from finetune_api.training import DEFAULT_MIN_UPDATE_STEPS, CheckpointFrequency

MERGED_NOTICE = (
    "output.merged writes a whole model beside the adapter, of the base model's size (in bfloat16 2 GB for each "
    "billion parameters): to the output, and where that is an object store also to the pod's disk until it is uploaded."
)
MERGED_FSDP_NOTICE = (
    "output.merged has no effect with sharding: fsdp, where GPUs share the model: run `finetune merge` on the adapter "
    "afterwards."
)
MERGED_QUANTIZED_NOTICE = (
    "output.merged merges the adapter into the weights as published, not as quantized for training: how far the logits "
    "of the two are apart is measured and said."
)


def effective_job(job: FineTuneJob) -> FineTuneJob:
    """`job` with its defaults written out and LLMForge's old spellings replaced; idempotent.

    What stays open needs more than the job: num_epochs, context_length and batch sizes (the data),
    gradient_checkpointing (the device), and output where none is given.

    Raises:
        ValueError: the job contradicts itself (`rules.spec_problems` says so beforehand).
    """
    spec = job.spec
    changes: dict[str, Any] = {
        "generation_config": _generation_config(spec),
        "workers": workers_of(spec),
        "output": spec.output or (Output(uri=spec.output_dir) if spec.output_dir else None),
        "output_dir": None,
        "eval_batch_size_per_device": spec.eval_batch_size_per_device or spec.train_batch_size_per_device,
        "min_num_update_steps": None,
        "no_gradient_checkpoint": None,
        "checkpoint_every_n_epochs": None,
    }
    if spec.num_epochs is None:
        changes["min_update_steps"] = spec.min_update_steps or spec.min_num_update_steps or DEFAULT_MIN_UPDATE_STEPS
    if spec.no_gradient_checkpoint is not None:
        changes["gradient_checkpointing"] = not spec.no_gradient_checkpoint
    if spec.checkpoint_every_n_epochs is not None:
        changes["checkpoint_and_evaluation_frequency"] = CheckpointFrequency(
            strategy="epochs", value=spec.checkpoint_every_n_epochs
        )
    written_out = job.model_copy(update={"spec": spec.model_copy(update=changes)}).model_dump(exclude_none=True)
    # Validated again so that every value counts as given: notices about absent keys are for the user's own text.
    return FineTuneJob.model_validate(written_out)


def _generation_config(spec: FineTuneJobSpec) -> Any:
    given = spec.generation_config
    if given is not None and given.prompt_format is not None:
        return given
    native = native_generation_config(spec.model_id)
    if given is None or native is None:
        return given or native
    stops = {
        key: getattr(given, key) if key in given.model_fields_set else getattr(native, key)
        for key in ("stopping_sequences", "stopping_tokens")
    }
    return given.model_copy(update={"prompt_format": native.prompt_format, **stops})


def notices(job: FineTuneJob) -> list[Problem]:
    """What the author of `job` should know although it will be done; paths start below `spec`."""
    spec = job.spec
    machines = accelerator_notice(spec.worker_resources)
    return [
        *keys_without_effect(spec),
        *([machines] if machines else []),
        *_unsaid(spec),
        *_old_spellings(spec),
        *_format(spec),
        *_other(spec),
    ]


def _unsaid(spec: FineTuneJobSpec) -> Iterator[Problem]:
    if "task" not in spec.model_fields_set:
        yield Problem("task", NO_TASK_NOTICE)
    if "lora_config" not in spec.model_fields_set:
        yield Problem("lora_config", NO_LORA_CONFIG_NOTICE)
    if spec.num_devices is not None and not spec.workers.model_fields_set & {"nodes", "gpus_per_node"}:
        workers = workers_of(spec)
        yield Problem(
            "num_devices",
            f"num_devices: {spec.num_devices} is taken as workers: {{nodes: {workers.nodes}, gpusPerNode: "
            f"{workers.gpus_per_node}}}; write that if the GPUs are spread differently.",
        )


def _old_spellings(spec: FineTuneJobSpec) -> Iterator[Problem]:
    if spec.no_gradient_checkpoint is not None:
        value = str(not spec.no_gradient_checkpoint).lower()
        yield Problem(
            "no_gradient_checkpoint",
            f"no_gradient_checkpoint is the old, inverted spelling: write gradient_checkpointing: {value}.",
        )
    if spec.checkpoint_every_n_epochs is not None:
        yield Problem(
            "checkpoint_every_n_epochs",
            "checkpoint_every_n_epochs is the old spelling: write checkpoint_and_evaluation_frequency: "
            f"{{strategy: epochs, value: {spec.checkpoint_every_n_epochs}}}.",
        )
    if spec.num_epochs is not None:
        for key in ("min_update_steps", "min_num_update_steps"):
            if getattr(spec, key) is not None:
                yield Problem(key, f"{key} has no effect, because num_epochs is given: remove one of the two.")


def _format(spec: FineTuneJobSpec) -> Iterator[Problem]:
    config = spec.generation_config
    if config is None:
        return
    if config.generate_kwargs is not None:
        yield Problem("generation_config.generate_kwargs", GENERATE_KWARGS_NOTICE)
    if isinstance(config.prompt_format, PromptFormat):
        for sentence in config.prompt_format.warnings(config.stopping_sequences):
            yield Problem("generation_config.prompt_format", sentence)


def _other(spec: FineTuneJobSpec) -> Iterator[Problem]:
    yield from lora_notices(spec.lora_config)
    if spec.output is not None and spec.output.merged:
        yield Problem("output.merged", MERGED_FSDP_NOTICE if spec.sharding == "fsdp" else MERGED_NOTICE)
        if spec.quantization is not None:
            yield Problem("output.merged", MERGED_QUANTIZED_NOTICE)
    if spec.valid_path is None:
        for key in ("eval_batch_size_per_device", "eval_first"):
            if getattr(spec, key):
                yield Problem(key, f"{key} has no effect without valid_path: give validation data or remove it.")
    elif spec.valid_path == spec.train_path:
        yield Problem(
            "valid_path",
            "valid_path is train_path, so the validation loss says nothing about other data: use a file of its own.",
        )
    if spec.model_revision is not None and (spec.model_id.startswith(("/", ".", "~")) or "://" in spec.model_id):
        yield Problem("model_revision", "model_revision has no effect, because model_id is no hub model: remove it.")
