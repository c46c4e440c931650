"""The base model of a published adapter, found and loaded, with the adapter on it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from finetune_api.defaults import effective_job
from finetune_api.outcome import Reason
from finetune_api.training import Quantization
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.model.adapter_state import put_tensors
from finetune_trainer.pins import BASE, model_source
from finetune_trainer.published.folder import AdapterFolder
from finetune_trainer.published.job_beside import job_beside
from finetune_trainer.storage import MANIFEST_NAME, FetchedModel, fetch_model
from finetune_trainer.storage.content import Content, content_of
from finetune_trainer.storage.manifest import parse_manifest


@dataclass(frozen=True)
class Base:
    """Where a base model is."""

    address: str
    """Folder, s3:// address or Hub name."""
    revision: str | None = None


def base_of(adapter: AdapterFolder, given: Base | None) -> Base:
    """The base model: the one that is given, that the adapter names, or that the job beside it was trained on.

    Raises:
        JobError: ModelNotFound, nobody names one.
    """
    if given is not None:
        return given
    if adapter.base_model is not None:
        return Base(adapter.base_model, adapter.base_revision)
    job = job_beside(adapter.path)
    if job is not None:
        source = model_source(effective_job(job).spec)
        return Base(source.address, source.revision)
    known = _details(adapter.path).get("baseModel")
    trained_on = f" (it was trained on {known!r}, which is no name on the Hub)" if isinstance(known, str) else ""
    raise JobError(
        Reason.MODEL_NOT_FOUND, f"{adapter.address} names no base model{trained_on}: give one with --base-model."
    )


def fetch_base(adapter: AdapterFolder, given: Base | None, *, trust_remote_code: bool) -> tuple[Base, FetchedModel]:
    """The base model's folder; the warnings say it where it is another one than the adapter was trained on.

    Args:
        adapter: whose.
        given: what the user names instead.
        trust_remote_code: whether its own code is fetched as well.

    Raises:
        JobError: as base_of and fetch_model.
    """
    base = base_of(adapter, given)
    key = "--base-model" if given is not None else f"it with --base-model ({adapter.address} names it)"
    pinned = Content.from_json(_details(adapter.path).get("pins", {}).get(BASE))
    if pinned is not None and pinned.address == base.address:
        base = Base(base.address, pinned.commit or base.revision)
    fetched = fetch_model(base.address, base.revision, trust_remote_code=trust_remote_code, key=key)
    if pinned is None:
        return base, fetched
    found = content_of(base.address, fetched)
    if found.kind == pinned.kind and found.value != pinned.value:
        warning = (
            f"{base.address} is not what the adapter was trained on ({pinned}; here {found.kind} {found.value}): its "
            "answers may be others."
        )
        return base, FetchedModel(fetched.path, fetched.resolved_revision, (*fetched.warnings, warning))
    return base, fetched


def quantization_of(adapter: AdapterFolder) -> Quantization | None:
    """How the base model was quantized that the adapter was trained on, as its manifest says."""
    found = _details(adapter.path).get("quantization")
    return found if found in get_args(Quantization) else None


def put_adapter(model: Any, adapter: AdapterFolder, base_name: str) -> Any:
    """The PeftModel of the base `model` with the adapter on it, opened by plain PEFT.

    Raises:
        JobError: InvalidSpec, it does not fit.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights

    opened: Any = None
    try:
        device = str(next(model.parameters()).device)
        with warnings.catch_warnings():
            # Of keys that others put beside PEFT's, of transposed weights, and of tied ones.
            warnings.simplefilter("ignore", UserWarning)
            opened = PeftModel.from_pretrained(model, str(adapter.path), torch_device=device)
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        # PEFT only warns of tensors that found no place.
        fault = put_tensors(opened, load_peft_weights(str(adapter.path), device="cpu", key_mapping=mapping))
    except Exception as error:  # PEFT lets whatever a foreign folder causes through.
        fault = f"PEFT cannot open it: {first_line(error)}"
    if fault is not None:
        raise JobError(
            Reason.INVALID_SPEC,
            f"The adapter {adapter.address} does not fit {base_name} ({fault}): give the base model that it was "
            "trained on with --base-model.",
        )
    return opened.eval()


def load_tokenizer_of(folder: Path, name: str) -> Any:
    """transformers' tokenizer in a published folder, which the user calls `name`.

    Raises:
        JobError: InvalidSpec, it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # A foreign folder can make transformers raise anything.
        raise JobError(
            Reason.INVALID_SPEC,
            f"The tokenizer in {name} cannot be loaded ({first_line(error)}): copy the folder again.",
        ) from error


def _details(folder: Path) -> dict[str, Any]:
    try:
        details = parse_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder)).details
    except (OSError, JobError):
        return {}
    return details if isinstance(details.get("pins", {}), dict) else {}
