"""`merge`: from an adapter to a whole model that says the same, or a sentence and nothing left behind.

The logits of a few prompts are compared three times: those of the base with its adapter and of the weights that it was
folded into, equal but for rounding; those and what the folder's precision leaves of them; the latter and those of the
folder, reopened by plain transformers.
"""

from __future__ import annotations

import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.merge import logits as compare
from finetune_trainer.merge.fold import fold
from finetune_trainer.merge.folder import copy_small_files, public_name, round_weights, write_card, write_weights
from finetune_trainer.merge.opened import adapter_at, load_base
from finetune_trainer.model.load import load_model
from finetune_trainer.published.base import Base, fetch_base, put_adapter, quantization_of
from finetune_trainer.published.folder import AdapterFolder
from finetune_trainer.quiet import quiet_libraries
from finetune_trainer.storage import MANIFEST_NAME, FetchedModel, write_manifest
from finetune_trainer.storage.errors import human_bytes, local_errors, require_space
from finetune_trainer.storage.manifest import parse_manifest

_MOST_OF_THE_EFFECT = 0.5
"""Share of what the adapter changes, in the mean over all logits, that rounding may undo."""


@dataclass(frozen=True)
class Merged:
    """A merged model that stood its comparison."""

    folder: Path
    base_model: str
    dtype: str
    size_bytes: int
    sha256: str
    """Of its manifest."""
    prompts: int
    difference: float
    """Largest of a logit between the adapter on its base and the folder."""
    difference_from_base: float
    """Largest of a logit that the adapter makes, for comparison."""
    same_choice: float
    """Share of the compared positions at which both rank the same token first."""
    notices: tuple[str, ...]

    def compared(self) -> dict[str, float]:
        """What was compared, for programs and the manifest."""
        return {
            "prompts": self.prompts,
            "difference": self.difference,
            "differenceFromBase": self.difference_from_base,
            "sameChoice": self.same_choice,
        }

    def sentence(self) -> str:
        """What was compared, for people."""
        return (
            f"On {self.prompts} prompts its logits differ by up to {self.difference:.2g} from those of the base model "
            f"with the adapter, which differ by up to {self.difference_from_base:.2g} from the base model's."
        )


def merge(
    adapter: str,
    target: Path,
    *,
    base_model: str | None = None,
    weights: Path | None = None,
    details: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Merged:
    """Merge `adapter` into its base model, and write the result to `target`: complete or not at all.

    Args:
        adapter: its folder, its job's output folder, or an s3://, pvc:// or hf://owner/name address.
        target: a folder that does not exist or is empty.
        base_model: base weights (folder, s3:// or Hub id) instead of those that the adapter names.
        weights: the folder of `base_model` where it is at hand already.
        details: goes into the manifest.
        dtype: precision of the result, the base model's when None.
        device: what is computed on; CPU, in float32, when None.
        trust_remote_code: whether Python code of the base model may run.
        say: is told what is done.

    Raises:
        JobError: AdapterUnproven, the result does not say the same; OutputConflict, `target` is in use; or what
            opening, merging and writing meet.
    """
    _check_free(target)
    device = device or torch.device("cpu")
    with quiet_libraries(), adapter_at(adapter) as found:
        if weights is None:
            say("Fetching the base model")
            given = Base(base_model) if base_model is not None else None
            named, fetched = fetch_base(found, given, trust_remote_code=trust_remote_code)
            base, revision = named.address, fetched.resolved_revision
        else:
            base, fetched, revision = base_model or "", FetchedModel(weights, None), found.base_revision
        scratch = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        with local_errors(target):
            scratch.mkdir(parents=True)
        try:
            result = _merge(
                found, fetched.path, base, revision, scratch, details, dtype, device, trust_remote_code, say
            )
            with local_errors(target):
                scratch.chmod(0o755)
                scratch.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Merged(**{**result, "folder": target, "notices": (*fetched.warnings, *result["notices"])})


def _merge(
    adapter: AdapterFolder,
    base_folder: Path,
    base_name: str,
    revision: str | None,
    scratch: Path,
    details: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    device: torch.device,
    trust: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    computed = torch.bfloat16 if device.type == "cuda" else torch.float32
    say("Loading the base model and the adapter")
    base = load_base(base_folder, dtype=computed, name=base_name, trust_remote_code=trust)
    base.model.to(device)
    dtype = dtype or (base.precision if computed is torch.float32 else computed)
    needed = sum(weight.numel() for weight in base.model.parameters()) * dtype.itemsize
    require_space(scratch, needed, "The merged model")
    tokenizer = _tokenizer(adapter.path if (adapter.path / "tokenizer_config.json").is_file() else base_folder, trust)
    rows = compare.prompts(adapter.path, tokenizer, base.model.get_input_embeddings().weight.shape[0])
    model = put_adapter(base.model, adapter, base_name)
    say("Merging")
    unmerged, again = compare.logits(model, rows), compare.logits(model, rows)
    with model.disable_adapter():
        effect = compare.difference(compare.logits(model, rows), unmerged)
    merged, notices = fold(model, adapter.address)
    bound = compare.allowed(unmerged, again, computed)
    expected = compare.logits(merged, rows)
    _check(unmerged, expected, bound, "merged")
    if round_weights(merged, base, dtype):
        expected = compare.logits(merged, rows)
    if not effect.largest > bound:
        notices.append(
            f"{adapter.address} changes no logit by more than rounding ({effect.largest:.1g}): is it trained?"
        )
    rounded = compare.difference(unmerged, expected)
    if not rounded.mean <= _MOST_OF_THE_EFFECT * effect.mean and rounded.largest > bound:
        raise JobError(
            Reason.ADAPTER_UNPROVEN,
            f"The merged model is refused: {_name(dtype)} is too coarse for what the adapter changes (it moves logits "
            f"by {effect.mean:.2g} in the mean, and rounding moves them by {rounded.mean:.2g}): merge with --dtype "
            "float32, or serve the adapter as it is.",
        )
    say(f"Writing {human_bytes(needed)}")
    whole = merged.config.model_type == base.config.model_type
    with local_errors(scratch):
        write_weights(merged, scratch, base, dtype)
        copy_small_files(scratch, adapter.path, base_folder, whole=whole)
    say("Opening it again")
    _tokenizer(scratch, trust)
    reopened = compare.logits(_reopened(scratch, computed, device, trust), rows)
    _check(expected, reopened, bound, "merged and reopened")
    told = compare.difference(unmerged, reopened)
    quantization = quantization_of(adapter)
    if quantization is not None:
        say(f"Comparing it with the base model in {quantization}, as in training")
        trained = load_model(
            base_folder,
            dtype=computed,
            trust_remote_code=trust,
            name=base_name,
            quantization=quantization,
            device=device,
        )
        as_trained = compare.logits(put_adapter(trained, adapter, base_name), rows)
        notices.append(_quantized_notice(compare.difference(as_trained, reopened), quantization, base_name))
    result = Merged(
        folder=scratch,
        base_model=base_name,
        dtype=_name(dtype),
        size_bytes=0,
        sha256="",
        prompts=len(rows),
        difference=told.largest,
        difference_from_base=effect.largest,
        same_choice=told.same_choice,
        notices=(*base.notices, *notices),
    )
    with local_errors(scratch):
        write_card(scratch, adapter.path, base_name, revision, dtype, result.sentence())
        manifest = write_manifest(scratch, _details(adapter, revision, result) | dict(details or {}))
    return {**vars(result), "size_bytes": manifest.size_bytes, "sha256": manifest.sha256()}


def _quantized_notice(apart: compare.Difference, quantization: str, base_name: str) -> str:
    return (
        f"The adapter was trained on {base_name} in {quantization} and is merged into the weights as published: the "
        f"merged model's logits differ by up to {apart.largest:.2g} (by {apart.mean:.2g} in the mean) from those that "
        f"were trained, and rank the same token first at {apart.same_choice:.0%} of the positions."
    )


def _check(one: compare.Logits, other: compare.Logits, bound: float, what: str) -> None:
    apart = compare.difference(one, other).largest
    if not apart <= bound:
        raise JobError(
            Reason.ADAPTER_UNPROVEN,
            f"The merged model is refused: {what}, its logits differ by up to {apart:.3g} from those of the adapter on "
            f"its base model (rounding explains {bound:.1g}). Serve the adapter as it is, and report this with the "
            "model's name.",
        )


def _details(adapter: AdapterFolder, revision: str | None, result: Merged) -> dict[str, Any]:
    found: dict[str, Any] = {
        "baseModel": public_name(result.base_model),
        "baseModelRevision": revision,
        "dtype": result.dtype,
        "compared": result.compared(),
    }
    if (file := adapter.path / MANIFEST_NAME).is_file():
        manifest = parse_manifest(file.read_bytes(), str(file))
        found |= {"adapter": manifest.sha256(), "run": manifest.details.get("run")}
    return found


def _reopened(folder: Path, dtype: torch.dtype, device: torch.device, trust: bool) -> Any:
    """The merged model as anybody opens it."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model, info = auto.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust, local_files_only=True, output_loading_info=True
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # As everywhere: transformers raises whatever a model's code leads it to.
        raise _not_reopened(first_line(error)) from error
    lost = [*info["missing_keys"], *info["unexpected_keys"], *(str(key) for key, *_ in info["mismatched_keys"])]
    if lost:
        raise _not_reopened(f"{len(lost)} weights do not come back, {min(lost)} for one")
    return model.to(device).eval()


def _tokenizer(folder: Path, trust: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    except Exception as error:  # As above.
        raise JobError(
            Reason.INVALID_SPEC, f"The tokenizer in {folder} cannot be loaded ({first_line(error)}): copy it again."
        ) from error


def _not_reopened(what: str) -> JobError:
    return JobError(
        Reason.ADAPTER_UNPROVEN,
        f"The merged model is refused: transformers does not open it as it was written ({what}). Serve the adapter as "
        "it is, and report this with the model's name.",
    )


def _check_free(target: Path) -> None:
    with local_errors(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise JobError(Reason.OUTPUT_CONFLICT, f"{target} exists already: choose a folder that does not.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
