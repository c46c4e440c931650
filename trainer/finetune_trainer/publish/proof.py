"""The adapter is proven before the job is called a success.

A run can end well and leave an adapter that does nothing: rates of 0, a layer that no loader finds again, a setting
that did not reach adapter_config.json, bytes that an object store lost. So what was uploaded is read back, opened by
plain PEFT beside the adapter in memory, and compared with it: every tensor bit by bit, then the logits of real rows,
which must be those of training and not those of the base model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from finetune_api.outcome import Reason, VerifiedResult
from finetune_trainer.errors import JobError
from finetune_trainer.model.adapter_state import (
    PREFIX,
    adapter_tensors,
    digests,
    load_fault,
    not_finite,
    put_tensors,
)
from finetune_trainer.model.batch import TokenPair, pad
from finetune_trainer.model.loss import takes_logits_to_keep, target_logits
from finetune_trainer.train.checkpoint import ADAPTER

_REOPENED = "reopened"
_ROWS = 4
_ROW_TOKENS = 256
_COMPARED_TOKENS = 32
"""Positions of each row at whose logits is looked: a vocabulary of 256 k makes 32 MB of them."""
_NOISE = 4.0
"""Differences are told from those between two equal passes (kernels that add in any order) by this factor."""


@dataclass(frozen=True)
class Movement:
    """What training did to the adapter's tensors."""

    tensors: int
    moved: int
    untouched_layers: list[str]
    """Layers none of whose tensors moved: no row of the data reached them."""

    def notice(self) -> list[str]:
        """A sentence about layers that were not trained."""
        if not self.untouched_layers:
            return []
        shown = ", ".join(self.untouched_layers[:5])
        others = f" and {len(self.untouched_layers) - 5} others" if len(self.untouched_layers) > 5 else ""
        what = "these layers received no gradient from this data, so their adapter does nothing"
        return [f"Training has not changed {shown}{others}: {what}."]


def movement(start: Mapping[str, str], trained: Mapping[str, torch.Tensor], *, learning_rate: float) -> Movement:
    """What moved since the start.

    A layer that moved in part counts as moved: A receives its first gradient when B is no longer zero.

    Args:
        start: digests of the tensors before the first step.
        trained: the tensors that are to be published.
        learning_rate: for the sentence.

    Raises:
        JobError: AdapterUnproven, training has changed nothing or what it made is no adapter.
    """
    if start.keys() != trained.keys():
        odd = sorted(start.keys() ^ trained.keys())
        raise _unproven(f"{len(odd)} of its tensors were not there at the start or are no more, {odd[0]} for one")
    if broken := not_finite(trained):
        raise _unproven(f"{broken[0]} has values that are no numbers")
    moved = {name for name, digest in digests(trained).items() if digest != start[name]}
    if not moved or not any(bool(tensor.any()) for name, tensor in trained.items() if _is_b(name)):
        what = "every lora_B is zero" if moved else f"none of the adapter's {len(trained)} tensors moved"
        raise JobError(
            Reason.ADAPTER_UNPROVEN,
            f"Training has changed nothing, {what}: raise learning_rate (it is {learning_rate:g}) or train more steps.",
        )
    touched = {_layer(name) for name in moved}
    return Movement(len(trained), len(moved), sorted({_layer(name) for name in trained} - touched))


def prove(
    folder: Path,
    *,
    model: Any,
    trained: Mapping[str, torch.Tensor],
    moved: Movement,
    rows: Sequence[TokenPair],
    sharded: bool,
) -> VerifiedResult:
    """Open the adapter in `folder` and compare it with `model`, which is left with the tensors in `trained`.

    Args:
        folder: what was read back from the output.
        model: the PeftModel in memory.
        trained: the tensors that were to be published.
        moved: what is known of them.
        rows: some of the data.
        sharded: the other processes hold parts of the model, so that nothing can be computed here.

    Raises:
        JobError: AdapterUnproven.
    """
    read = load_file(folder / ADAPTER)
    if read.keys() != trained.keys() or not all(_same(read[name], trained[name]) for name in trained):
        raise _unproven("its file does not hold the tensors of the checkpoint")
    result = VerifiedResult(tensors=moved.tensors, moved_tensors=moved.moved, rows=0)
    if sharded:
        return result
    if fault := put_tensors(model, trained):
        raise _unproven(fault)
    with _beside(model, folder):
        opened = adapter_tensors(model, adapter=_REOPENED)
        if opened.keys() != trained.keys() or not all(_same(opened[name], trained[name]) for name in trained):
            raise _unproven("PEFT puts other tensors into the model than were trained")
        if not rows:
            return result
        batches = [pad([_end_of(row)], 0) for row in sorted(rows, key=lambda row: -len(row[0]))[:_ROWS]]
        in_memory, again = _logits(model, batches, "default"), _logits(model, batches, "default")
        reopened = _logits(model, batches, _REOPENED)
        with model.disable_adapter():
            base = _logits(model, batches, None)
    noise = _NOISE * _difference(in_memory, again)
    from_training, from_base = _difference(in_memory, reopened), _difference(base, reopened)
    if not from_training <= noise:
        raise _unproven(
            f"on {len(batches)} rows its logits differ by up to {from_training:.3g} from those of the model that was "
            "trained"
        )
    if not from_base > noise:
        raise JobError(
            Reason.ADAPTER_UNPROVEN,
            f"The adapter changes no logit on {len(batches)} rows (by {from_base:.1g} at most, in the precision of the "
            "model): raise learning_rate or train more steps.",
        )
    found = {"rows": len(batches), "difference_from_training": from_training, "difference_from_base": from_base}
    return result.model_copy(update=found)


def sentence(verified: VerifiedResult) -> str:
    """What was checked, for the console."""
    begun = f"Read back from there: {verified.tensors} tensors as trained, {verified.moved_tensors} of them moved"
    if not verified.rows:
        return f"{begun}; logits were not compared, since GPUs share the model."
    to_training, to_base = verified.difference_from_training, verified.difference_from_base
    return (
        f"{begun}; on {verified.rows} rows its logits differ by up to {to_training:.2g} from training's and by up to "
        f"{to_base:.2g} from the base model's."
    )


@contextmanager
def _beside(model: Any, folder: Path) -> Iterator[None]:
    """The adapter in `folder` in `model` as a second one, opened as PeftModel.from_pretrained does it."""
    mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None)
    training = model.training
    try:
        try:
            with warnings.catch_warnings():
                # PEFT's complaint about the context_length that stands beside its own keys.
                warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
                result = model.load_adapter(str(folder), _REOPENED, key_mapping=mapping, torch_device="cpu")
        except Exception as error:  # PEFT lets whatever it stumbles over through.
            raise _unproven(f"PEFT cannot open it ({str(error).strip()[:300]})") from error
        if fault := load_fault(result, _REOPENED):
            raise _unproven(fault)
        model.eval()
        yield
    finally:
        model.set_adapter("default")
        if _REOPENED in model.peft_config:
            model.delete_adapter(_REOPENED)
        model.train(training)


def _logits(model: Any, batches: Sequence[Any], adapter: str | None) -> list[torch.Tensor]:
    """Logits [P, V] of each batch, float32 on CPU."""
    if adapter is not None:
        model.set_adapter(adapter)
    device = next(model.parameters()).device
    keep = takes_logits_to_keep(model.get_base_model())
    with torch.no_grad():
        return [target_logits(model, batch.to(device), keep=keep)[0].float().cpu() for batch in batches]


def _difference(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest; NaN where a logit is none, which is neither small nor large."""
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def _end_of(row: TokenPair) -> TokenPair:
    ids = row[0][-_ROW_TOKENS:]
    return ids, np.arange(len(ids)) >= len(ids) - _COMPARED_TOKENS


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _is_b(name: str) -> bool:
    return ".lora_B" in name or ".lora_embedding_B" in name


def _layer(name: str) -> str:
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def _unproven(what: str) -> JobError:
    return JobError(
        Reason.ADAPTER_UNPROVEN,
        f"The adapter is not published, because it is not what was trained: {what}. Report this with the model's name; "
        "the checkpoints hold what was trained.",
    )
