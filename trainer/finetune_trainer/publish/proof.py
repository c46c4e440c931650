"""The adapter is proven before the job is called a success.

A run can end well and leave an adapter that does nothing: rates of 0, a layer that no loader finds again, a setting
that did not reach adapter_config.json, bytes that an object store lost. So what was uploaded is read back, opened by
plain PEFT on the base model in memory, and compared with it: every tensor bit by bit, then the logits of real rows,
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
    not_finite,
    put_tensors,
)
from finetune_trainer.model.batch import TokenPair, pad
from finetune_trainer.model.loss import takes_logits_to_keep, target_logits
from finetune_trainer.train.checkpoint_files import ADAPTER

_ROWS = 4
_ROW_TOKENS = 256
_COMPARED_TOKENS = 32
"""Positions of each row at whose logits is looked: a vocabulary of 256 k makes 32 MB of them."""
_NOISE = 4.0
"""Differences are told from those between two equal passes (kernels that add in any order) by this factor."""
_ROUNDING = 64.0
"""Units in the last place of the largest logit by which another order of the same sums may differ. A small Qwen3-Next,
whose linear attention carries sums along the row, makes 21."""


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
        model: the PeftModel in memory, as PEFT makes it.
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
    batches = [pad([_end_of(row)], 0) for row in sorted(rows, key=lambda row: -len(row[0]))[:_ROWS]]
    with _evaluating(model):
        in_memory, again = _logits(model, batches), _logits(model, batches)
        with model.disable_adapter():
            base = _logits(model, batches)
        with _opened_alone(model, folder) as opened:
            _check_tensors(adapter_tensors(opened), trained)
            reopened = _logits(opened, batches)
            by_weight = bool(opened.peft_config["default"].target_parameters)
    if not batches:
        return result
    noise = _NOISE * _difference(in_memory, again)
    from_training, from_base = _difference(in_memory, reopened), _difference(base, reopened)
    allowed = noise
    if by_weight:
        # A target parameter is added to its weight before the product, so its sums round in another order.
        largest = max(float(logits.abs().max()) for logits in in_memory)
        allowed = max(noise, _ROUNDING * torch.finfo(model.get_base_model().dtype).eps * largest)
    if not from_training <= allowed:
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


def _check_tensors(found: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor]) -> None:
    if lost := sorted(trained.keys() - found.keys()):
        raise _unproven(f"{len(lost)} of its tensors are in the file and not in the model, {lost[0]} for one")
    if empty := sorted(found.keys() - trained.keys()):
        raise _unproven(f"{len(empty)} tensors in the model have no tensor in the file, {empty[0]} for one")
    if not all(_same(found[name], trained[name]) for name in trained):
        raise _unproven("PEFT puts other tensors into the model than were trained")


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
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _opened_alone(model: Any, folder: Path) -> Iterator[Any]:
    """The adapter in `folder` on the base model of `model`, opened by plain PEFT; `model` gets its own back afterwards.

    Not as a second adapter beside the first: PEFT refuses there what it takes alone (a layer's weight as a target
    parameter, which is how layers beside a mixture's experts are published).
    """
    from peft import PeftModel

    base = model.get_base_model()
    known, own = getattr(base, "peft_config", None), _take_out(base)
    try:
        try:
            with warnings.catch_warnings():
                # Of PEFT's complaints one is about the context_length that stands beside its own keys; tensors that it
                # misses are compared by the caller.
                warnings.simplefilter("ignore", UserWarning)
                opened = PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
        except Exception as error:  # PEFT lets whatever it stumbles over through.
            raise _unproven(f"PEFT cannot open it ({str(error).strip()[:300]})") from error
        yield opened.eval()
    finally:
        _take_out(base)
        for parent, name, layer in own:
            setattr(parent, name, layer)
        base.peft_config = known


def _take_out(base: Any) -> list[tuple[Any, str, Any]]:
    """Put plain layers in the place of those with an adapter; returns what was where, as (parent, name, layer)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = []
    for parent in list(base.modules()):
        if isinstance(parent, BaseTunerLayer):
            continue
        for name, layer in list(parent.named_children()):
            if isinstance(layer, BaseTunerLayer):
                found.append((parent, name, layer))
                setattr(parent, name, layer.get_base_layer())
    return found


def _logits(model: Any, batches: Sequence[Any]) -> list[torch.Tensor]:
    """Logits [P, V] of each batch, float32 on CPU."""
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
