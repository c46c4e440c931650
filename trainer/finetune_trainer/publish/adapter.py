"""The adapter folder: with the base model it is all that is needed to answer as trained.

adapter_config.json, adapter_model.safetensors   what PEFT and vLLM load
tokenizer files, chat_template.jinja             render the trained prompt
generation_config.json                           the ids that end an answer
prompt_format.yaml                               the declared format and stops, for people and other servers
README.md, report.html                           what was trained on what, for people
SERVING.md                                       how to serve it, for people
manifest.json                                    digests, written last
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from finetune_api.chat_template import chat_template
from finetune_api.generation import GenerationConfig
from finetune_api.outcome import AdapterResult, DatasetResult, MetricsResult, Reason, VerifiedResult
from finetune_api.prompt_format import PromptFormat
from finetune_trainer.data.end_of_turn import answer_stops
from finetune_trainer.data.load_tokenizer import save_tokenizer
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.model.lora import published_config
from finetune_trainer.pins import BaseModelName, portable
from finetune_trainer.storage import MANIFEST_NAME, Manifest, ObjectStore, build_manifest, read_manifest

FOLDER = "adapter"

_CHANGES_GREEDY_ANSWERS = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "min_length", "min_new_tokens", "guidance_scale"),
)
"""Keys of a generation_config.json with which the likeliest answer is no longer given; servers read some of them."""

_ADDRESS_KEYS = ("model_id", "initial_base_model_ckpt_path", "initial_adapter_model_ckpt_path")


@dataclass(frozen=True)
class AdapterParts:
    """What goes into an adapter folder."""

    model: Any
    """The PeftModel."""
    weights: dict[str, torch.Tensor]
    tokenizer: ModelTokenizer
    generation: GenerationConfig
    base: BaseModelName


def write_adapter(folder: Path, parts: AdapterParts) -> None:
    """Write everything but the report and the manifest into `folder`."""
    _write_weights(folder, parts)
    tokenizer = parts.tokenizer.tokenizer
    if isinstance(parts.generation.prompt_format, PromptFormat):
        tokenizer.chat_template = chat_template(parts.generation.prompt_format, parts.tokenizer.automatic_bos)
    save_tokenizer(tokenizer, folder)
    _write_generation_config(folder, parts)
    text = yaml.safe_dump(
        parts.generation.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True, width=10_000
    )
    (folder / "prompt_format.yaml").write_text(text, encoding="utf-8")


def _write_weights(folder: Path, parts: AdapterParts) -> None:
    config = published_config(parts.model)
    # A path or bucket of this run means nothing, or something else, to whoever serves the adapter.
    config.base_model_name_or_path = parts.base.hub_name
    config.revision = parts.base.revision
    config.save_pretrained(str(folder))
    save_file(parts.weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_generation_config(folder: Path, parts: AdapterParts) -> None:
    """The base model's sampling, ended by every stop that is one token, the trained one among them.

    Penalties and the like stay behind: they were set for the base model, and the trained answers come without them.

    Stops that are several tokens can only be matched as text. They are written only where no token ends every answer,
    because `generate` then asks its caller for the tokenizer.
    """
    from transformers import GenerationConfig as HuggingFaceGenerationConfig

    base = parts.model.get_base_model()
    config = HuggingFaceGenerationConfig.from_dict(base.generation_config.to_dict())
    for key in _CHANGES_GREEDY_ANSWERS:
        setattr(config, key, None)
    stops = answer_stops(parts.tokenizer, parts.generation)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    tokenizer = parts.tokenizer.tokenizer
    ends = [token for token in dict.fromkeys([*known, tokenizer.eos_token_id, *stops.token_ids]) if token is not None]
    config.eos_token_id = ends
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if stops.by_text:
        config.stop_strings = stops.texts
    config.save_pretrained(str(folder))


def publish_adapter(
    store: ObjectStore, folder: Path, details: dict[str, Any], verify: Callable[[Path], VerifiedResult]
) -> AdapterResult:
    """Upload `folder` as the job's adapter, read it back, and write its manifest if it stands the proof.

    Args:
        store: the job's output.
        folder: the finished adapter folder.
        details: goes into the manifest: `job`, `run`, `baseModel`, `baseModelRevision`, `targets`, `metrics`,
            `dataset`, ….
        verify: proves the copy that was read back.

    Raises:
        JobError: StorageUnavailable, other bytes come back than were written; or what `verify` raises. No adapter is
            there then.
    """
    manifest = build_manifest(folder, details)
    store.upload_tree(folder, FOLDER)
    copy = folder.with_name(f"{folder.name}-reopened")
    try:
        store.download_tree(FOLDER, copy, paths=list(manifest.files))
        _check_bytes(copy, manifest, store.uri_of(FOLDER))
        verified = verify(copy)
    except JobError:
        # Nobody should serve it by chance.
        with suppress(JobError):
            store.delete_tree(FOLDER)
        raise
    manifest = replace(manifest, details=manifest.details | {"verified": verified.model_dump(exclude_none=True)})
    store.write_bytes(f"{FOLDER}/{MANIFEST_NAME}", manifest.to_bytes())
    return adapter_result(store, manifest)


def _check_bytes(copy: Path, manifest: Manifest, uri: str) -> None:
    found = build_manifest(copy).files
    for path, entry in manifest.files.items():
        if found.get(path) != entry:
            raise JobError(
                Reason.STORAGE_UNAVAILABLE,
                f"{uri}/{path} came back other than it was written: see that nobody else writes there.",
            )


def adapter_result(store: ObjectStore, manifest: Manifest) -> AdapterResult:
    """What status says of a published adapter."""
    return AdapterResult(
        uri=store.uri_of(FOLDER),
        base_model=str(manifest.details["baseModel"]),
        base_model_revision=manifest.details.get("baseModelRevision"),
        sha256=manifest.sha256(),
        size_bytes=manifest.size_bytes,
        targets=manifest.details.get("targets"),
        verified=manifest.details.get("verified"),
    )


def published_results(store: ObjectStore, manifest: Manifest) -> tuple[AdapterResult, DatasetResult, MetricsResult]:
    """What the manifest of a published adapter says that came out of its job.

    Raises:
        JobError: OutputConflict, it says nothing of the kind: it was not written by a trainer.
    """
    try:
        dataset = DatasetResult.model_validate(manifest.details.get("dataset"))
        return adapter_result(store, manifest), dataset, metrics_of(manifest)
    except (LookupError, ValueError) as error:
        raise JobError(
            Reason.OUTPUT_CONFLICT,
            f"{store.uri_of(FOLDER)}/{MANIFEST_NAME} says that this job is finished, but not what came out of it: "
            "choose another output, or remove the folder.",
        ) from error


def finished_adapter(store: ObjectStore, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of the adapter that this very job published earlier, or None when there is none.

    Raises:
        JobError: OutputConflict, the output holds the adapter of another job.
    """
    manifest = read_manifest(store, FOLDER)
    if manifest is None:
        return None
    found, identity = manifest.details.get("run"), published_identity(identity)
    if found != identity:
        found = found if isinstance(found, dict) else {}
        names = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
        raise JobError(
            Reason.OUTPUT_CONFLICT,
            f"{store.uri_of(FOLDER)} already holds the adapter of another run (it differs in {', '.join(names)}): "
            "choose another output, or remove the folder.",
        )
    return manifest


def published_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """What decides the course of training, as a manifest has it: without the paths of the machine that trained."""
    return {
        key: portable(value) if key in _ADDRESS_KEYS and isinstance(value, str) else value
        for key, value in identity.items()
    }


def metrics_of(manifest: Manifest) -> MetricsResult:
    """The final figures in an adapter's manifest."""
    return MetricsResult.model_validate(manifest.details.get("metrics", {}))
