"""What can be said of a job's chat template without a download: only where the tokenizer is on this machine already."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from finetune_api.job import FineTuneJobSpec
from finetune_api.prompt_format import HuggingFaceChatTemplate
from finetune_api.storage_uri import Scheme
from finetune_trainer.data.format_warnings import format_warnings
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.pins import ModelSource, model_source
from finetune_trainer.storage.addresses import local_path, parse_address


def template_warnings(spec: FineTuneJobSpec) -> list[str]:
    """What `preview` would say of a job's chat template; nothing where that needs a download or foreign code."""
    generation = spec.generation_config
    if generation is None or not isinstance(generation.prompt_format, HuggingFaceChatTemplate):
        return []
    try:
        folder = _folder(model_source(spec))
        tokenizer = None if folder is None else load_tokenizer(folder, trust_remote_code=False)
    except JobError:  # The path may be another machine's, the copy incomplete: the job and `preview` will tell.
        return []
    if tokenizer is None:
        return []
    try:
        return format_warnings(tokenizer, generation)
    except JobError as error:
        return [error.message]


def _folder(source: ModelSource) -> Path | None:
    address = parse_address(source.address)
    if address.scheme in (Scheme.S3, Scheme.HUB_DATASET):
        return None
    folder = local_path(address)
    if folder.is_dir():
        return folder
    if address.scheme is Scheme.PVC or source.address.startswith(("/", ".", "~", "file:")):
        return None
    try:
        cached = huggingface_hub.try_to_load_from_cache(
            source.address, "tokenizer_config.json", revision=source.revision
        )
    except HFValidationError:  # A file in a repository, or a mistake that the job will name.
        return None
    return Path(cached).parent if isinstance(cached, str) else None
