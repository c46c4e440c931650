"""From a job to what is needed before any weight is: tokenizer, prompt format, data sources, and the run's identity."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from finetune_api.generation import GenerationConfig
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.outcome import Reason
from finetune_api.prompt_format import HuggingFaceChatTemplate, PromptFormat, PromptFormatSpec
from finetune_trainer.data.conversation import RowRules
from finetune_trainer.data.dataset import DataSource
from finetune_trainer.data.files import as_jsonl
from finetune_trainer.data.format_warnings import format_warnings
from finetune_trainer.data.render import FIELDS, asks_for_date, make_renderer, takes_tools, today, unwritten_fields
from finetune_trainer.data.template_trial import refuse_endless
from finetune_trainer.data.tokenizer import ModelTokenizer, load_tokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import check_context_length, load_config, vocabulary_size
from finetune_trainer.model.support import build_skeleton, config_notices, text_config
from finetune_trainer.model.targets import resolve_targets
from finetune_trainer.model.weights import check_headers, check_names
from finetune_trainer.pins import ModelSource, Pins, model_source
from finetune_trainer.storage import default_cache_dir, fetch_file, fetch_tokenizer

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
    "quantization",
    "padding",
)
"""Keys of the spec that decide the course of training. Others (loggers, how often to save) may change on a resume."""


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
    vocabulary: int | None
    """Token ids that the model has an embedding for; see vocabulary_size."""
    parameters: int
    """Of the base model; 0 where only its own code knows."""
    warnings: list[str]
    day: date
    """What a chat template is told that asks for today's."""

    @property
    def pad_id(self) -> int:
        """Token that fills padded rows; nothing depends on which, but the model must have an embedding for it."""
        tokenizer = self.tokenizer.tokenizer
        usual = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return next((token for token in usual if token is not None and self.has(token)), 0)

    def has(self, token: int) -> bool:
        """Whether the model has an embedding for `token`."""
        return self.vocabulary is None or token < self.vocabulary


def load_model_inputs(spec: FineTuneJobSpec, pins: Pins | None = None) -> ModelInputs:
    """Fetch tokenizer and configuration, and check the job against them.

    Args:
        spec: the job's.
        pins: what its addresses stand for and when the run began; None to take what is there now.

    Raises:
        JobError: the model cannot be had, has no usable tokenizer, or is too short for context_length.
    """
    source = model_source(spec)
    commit = pins.base.commit if pins is not None else None
    fetched = fetch_tokenizer(source.address, commit or source.revision, code=spec.trust_remote_code)
    trusted = spec.trust_remote_code
    config = load_config(fetched.path, trust_remote_code=trusted, name=source.address)
    skeleton = build_skeleton(config, source.address, trust_remote_code=trusted)
    context_length = check_context_length(spec.context_length, config, source.address, skeleton)
    if skeleton is not None:
        # A folder has its weights already; of others only what is small was fetched so far.
        here = fetched.resolved_revision is None and any(fetched.path.glob("*.safetensors"))
        (check_headers if here else check_names)(fetched.path, skeleton, source.address)
    targets = None
    if skeleton is not None and spec.initial_adapter_model_ckpt_path is None:
        # Names that the model does not have are refused before its weights are fetched.
        targets = resolve_targets(skeleton, spec.lora_config, None)
    tokenizer = load_tokenizer(fetched.path, trust_remote_code=trusted)
    generation = spec.generation_config
    if generation is None or generation.prompt_format is None:
        raise JobError(
            Reason.INVALID_SPEC,
            f"{spec.model_id} has no published prompt format: write generation_config.prompt_format.",
        )
    if isinstance(generation.prompt_format, HuggingFaceChatTemplate):
        refuse_endless(tokenizer.tokenizer)
    warnings = [
        *fetched.warnings,
        *config_notices(config, source.address),
        *format_warnings(tokenizer, generation),
        *(targets.notices if targets else ()),
    ]
    return ModelInputs(
        source,
        fetched.resolved_revision,
        config,
        tokenizer,
        generation,
        generation.prompt_format,
        context_length,
        vocabulary_size(text_config(config, source.address), skeleton),
        sum(parameter.numel() for parameter in skeleton.parameters()) if skeleton is not None else 0,
        warnings,
        pins.began if pins is not None else today(),
    )


def check_vocabulary(inputs: ModelInputs, highest: int) -> None:
    """Refuse data with a token that the model has no embedding for; `highest` is the highest id in them.

    Tokenizers may hold more tokens than the model, as long as no text makes them (Gemma 3's for images).

    Raises:
        JobError: ModelUnsupported.
    """
    if inputs.has(highest):
        return
    token = inputs.tokenizer.tokenizer.convert_ids_to_tokens(highest)
    raise JobError(
        Reason.MODEL_UNSUPPORTED,
        f"The data have token {highest} ({token!r}), but {inputs.source.address} has embeddings for "
        f"{inputs.vocabulary} tokens only: its tokenizer belongs to another model, or {token!r} was added to it later; "
        "take both from the same place, or a prompt_format and data without that token.",
    )


def data_source(spec: FineTuneJobSpec, inputs: ModelInputs, address: str) -> DataSource:
    """The data file at `address`, fetched, with the rules of the job."""
    prompt_format = inputs.prompt_format
    train_all = spec.task == "causal_lm"
    strip = isinstance(prompt_format, PromptFormat) and prompt_format.strip_whitespace
    template = None if isinstance(prompt_format, PromptFormat) else inputs.tokenizer.tokenizer.chat_template
    dated = {"date": inputs.day.isoformat()} if asks_for_date(template) else {}
    return DataSource(
        path=as_jsonl(fetch_file(address), address, default_cache_dir() / "rows"),
        name=address,
        rules=RowRules(
            needs_answer=not train_all,
            strip_whitespace=strip,
            tools=takes_tools(template),
            fields=() if template is None else FIELDS,
            unwritten=unwritten_fields(template),
        ),
        renderer=make_renderer(prompt_format, inputs.tokenizer, train_all=train_all, day=inputs.day),
        tokenizer=inputs.tokenizer.row_tokenizer(),
        settings={
            "tokenizer": inputs.tokenizer.fingerprint(),
            "format": prompt_format.model_dump(),
            "template": template,
            **dated,
        },
        context_length=inputs.context_length,
        train_all=train_all,
        max_invalid_share=spec.max_invalid_row_share,
        max_dropped_share=spec.max_dropped_row_share,
        max_truncated_share=spec.max_truncated_row_share,
        bos_id=inputs.tokenizer.tokenizer.bos_token_id if inputs.tokenizer.automatic_bos else None,
    )


def identity(job: FineTuneJob, train_sha256: str) -> dict[str, Any]:
    """What decides the course of training, by name: two runs with the same identity train the same adapter."""
    spec = job.spec.model_dump(mode="json", exclude_none=True)
    return {key: spec[key] for key in IDENTITY_KEYS if key in spec} | {"train_data_sha256": train_sha256}


def tokenized_folder(cache: Path) -> Path:
    """Where tokenized data is kept in a cache folder."""
    return cache / "tokenized"
