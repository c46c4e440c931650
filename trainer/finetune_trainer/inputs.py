"""From a job to what is needed before any weight is: tokenizer, prompt format, data sources, and the run's identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.generation import GenerationConfig
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.outcome import Reason
from finetune_api.prompt_format import PromptFormat, PromptFormatSpec
from finetune_api.training import HubRepository
from finetune_trainer.data.conversation import RowRules
from finetune_trainer.data.dataset import DataSource
from finetune_trainer.data.format_warnings import format_warnings
from finetune_trainer.data.render import make_renderer
from finetune_trainer.data.tokenizer import ModelTokenizer, load_tokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import check_context_length, load_config
from finetune_trainer.storage import fetch_file, fetch_tokenizer

IDENTITY_KEYS = (
    "model_id",
    "model_revision",
    "initial_base_model_ckpt_path",
    "initial_adapter_model_ckpt_path",
    "task",
    "generation_config",
    "context_length",
    "max_invalid_row_share",
    "max_dropped_row_share",
    "num_epochs",
    "min_update_steps",
    "train_batch_size_per_device",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "num_warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "lora_config",
    "padding",
)
"""Keys of the spec that decide the course of training. Others (loggers, how often to save) may change on a resume."""


@dataclass(frozen=True)
class ModelSource:
    """Where weights and tokenizer come from."""

    address: str
    """Hub name, folder, or s3:// prefix."""
    revision: str | None


@dataclass(frozen=True)
class ModelInputs:
    """All of the model but its weights."""

    source: ModelSource
    revision: str | None
    """Commit of the model on the Hub, where it has one."""
    config: Any
    """transformers' configuration."""
    tokenizer: ModelTokenizer
    generation: GenerationConfig
    prompt_format: PromptFormatSpec
    """`generation`'s, which is never missing here."""
    context_length: int | None
    """Tokens after which rows are cut."""
    warnings: list[str]


def weights_source(value: str | HubRepository | None) -> ModelSource | None:
    """The source that an initial_*_ckpt_path names."""
    if isinstance(value, HubRepository):
        return ModelSource(value.repo_id, value.revision)
    return ModelSource(value, None) if value is not None else None


def model_source(spec: FineTuneJobSpec) -> ModelSource:
    """initial_base_model_ckpt_path where it is given, else the model id."""
    return weights_source(spec.initial_base_model_ckpt_path) or ModelSource(spec.model_id, spec.model_revision)


def load_model_inputs(spec: FineTuneJobSpec) -> ModelInputs:
    """Fetch tokenizer and configuration, and check the job against them.

    Raises:
        JobError: the model cannot be had, has no usable tokenizer, or is too short for context_length.
    """
    source = model_source(spec)
    fetched = fetch_tokenizer(source.address, source.revision, code=spec.trust_remote_code)
    config = load_config(fetched.path, trust_remote_code=spec.trust_remote_code)
    context_length = check_context_length(spec.context_length, config, spec.model_id)
    tokenizer = load_tokenizer(fetched.path, trust_remote_code=spec.trust_remote_code)
    generation = spec.generation_config
    if generation is None or generation.prompt_format is None:
        raise JobError(
            Reason.INVALID_SPEC,
            f"{spec.model_id} has no published prompt format: write generation_config.prompt_format.",
        )
    warnings = format_warnings(tokenizer, generation)
    return ModelInputs(
        source,
        fetched.resolved_revision,
        config,
        tokenizer,
        generation,
        generation.prompt_format,
        context_length,
        warnings,
    )


def data_source(spec: FineTuneJobSpec, inputs: ModelInputs, address: str) -> DataSource:
    """The data file at `address`, fetched, with the rules of the job."""
    prompt_format = inputs.prompt_format
    train_all = spec.task == "causal_lm"
    strip = isinstance(prompt_format, PromptFormat) and prompt_format.strip_whitespace
    return DataSource(
        path=fetch_file(address),
        name=address,
        rules=RowRules(needs_answer=not train_all, strip_whitespace=strip),
        renderer=make_renderer(prompt_format, inputs.tokenizer, train_all=train_all),
        tokenizer=inputs.tokenizer.row_tokenizer(),
        settings={
            "tokenizer": inputs.tokenizer.fingerprint(),
            "format": prompt_format.model_dump(),
            "template": None if isinstance(prompt_format, PromptFormat) else inputs.tokenizer.tokenizer.chat_template,
        },
        context_length=inputs.context_length,
        train_all=train_all,
        max_invalid_share=spec.max_invalid_row_share,
        max_dropped_share=spec.max_dropped_row_share,
        bos_id=inputs.tokenizer.tokenizer.bos_token_id if inputs.tokenizer.automatic_bos else None,
    )


def identity(job: FineTuneJob, train_sha256: str) -> dict[str, Any]:
    """What decides the course of training, by name: two runs with the same identity train the same adapter."""
    spec = job.spec.model_dump(mode="json", exclude_none=True)
    return {key: spec[key] for key in IDENTITY_KEYS if key in spec} | {"train_data_sha256": train_sha256}


def tokenized_folder(cache: Path) -> Path:
    """Where tokenized data is kept in a cache folder."""
    return cache / "tokenized"
