"""The exactness gate: before the first step, rows are laid out in packs only if that changes nothing for this model.

Loss and adapter gradients of a few real rows are computed one row at a time by the model's own code, and again in
packs. Where they differ the next simpler layout is tried, down to padded rows, which need no trust. That a model reads
position ids and leaves attention to transformers' interface is thereby measured, not believed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune_api.outcome import BatchLayout
from finetune_trainer.launch.failures import out_of_memory, quoted
from finetune_trainer.model.batch import Batch, TokenPair, pad
from finetune_trainer.model.fused_lora import fuse_lora, unfuse_lora
from finetune_trainer.model.packed_attention import PackingRefusedError, use_packed_attention, usual_attention
from finetune_trainer.model.packed_forward import take_packs
from finetune_trainer.model.prefix_tree import MIN_SHARED, Pack, common_beginning, lexicographic
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.passes import Passes

SAMPLE_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Most tokens of the rows that are compared, by kind of device: about a second of it, or less than a step."""

_TRAINED_TOKENS = 32
"""At least so many of each row."""

_CLOSE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1), torch.float16: (2e-2, 1e-1)}
"""Relative differences of (loss, whole gradient) that rounding alone makes, by the base model's precision. A row that
sees another's tokens, or stands in the wrong place, makes larger ones."""

_LAYOUTS = (BatchLayout.SHARED_PREFIX, BatchLayout.PACKED)


@dataclass(frozen=True)
class Verdict:
    """The layout that is used, and why."""

    layout: BatchLayout
    loss_difference: float | None = None
    """Relative, of this layout to one row at a time; None where nothing was compared."""
    gradient_difference: float | None = None
    """Relative, on the whole gradient of the adapter."""
    refused: str = ""
    """Why it is not the first layout; ends no sentence."""
    seconds: float = 0.0


class Gate:
    """Compares layouts on one model.

    Args:
        model: the PeftModel, not wrapped.
        wrapped: the same as training runs it.
        passes: forward and backward passes as training makes them.
        ranks: this process among the others.
    """

    def __init__(self, model: Any, wrapped: Any, passes: Passes, ranks: Ranks) -> None:
        self._model = model
        self._wrapped = wrapped
        self._passes = passes
        self._ranks = ranks
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        base = model.get_base_model()
        self._close = _CLOSE.get(base.dtype, _CLOSE[torch.float32])

    def choose(self, sample: Sequence[TokenPair], batching: Batching) -> Verdict:
        """The first layout that is exact; the model is left as that layout needs it.

        Args:
            sample: sequences, the same on all ranks.
            batching: gives the bound of a pack.
        """
        began = time.monotonic()
        verdict = self._choose(sample, batching)
        return replace(verdict, seconds=time.monotonic() - began)

    def _choose(self, sample: Sequence[TokenPair], batching: Batching) -> Verdict:
        base = self._model.get_base_model()
        try:
            # Outside of packs it is the model's own.
            use_packed_attention(base)
        except PackingRefusedError as refused:
            return Verdict(BatchLayout.PADDED, refused=str(refused))
        with without_dropout(self._model):
            loss, gradient = self._outcome([pad([sequence], batching.pad_id) for sequence in sample])
            take_packs(base)
            fuse_lora(self._model)
            reasons: list[str] = []
            for layout in _LAYOUTS:
                laid_out = replace(batching, layout=layout)
                refusal, packed_loss, packed_gradient = "", math.nan, gradient
                try:
                    self._try_dropout(laid_out.batches([[_cut(sample[0], 0, 16)]])[0])
                    packed_loss, packed_gradient = self._outcome(laid_out.batches([list(sample)]))
                except Exception as error:  # Model code and kernels that nobody here has seen.
                    if out_of_memory(error, self._ranks.rank) is not None:
                        raise
                    refusal = _refusal(error)
                if self._ranks.any(bool(refusal)):
                    reasons.append(refusal or "packs fail in another process")
                    break
                found = (
                    abs(packed_loss - loss) / max(abs(loss), 1e-12),
                    self._norm(b - a for a, b in zip(gradient, packed_gradient, strict=True))
                    / max(self._norm(gradient), 1e-12),
                )
                close = all(difference <= most for difference, most in zip(found, self._close, strict=True))
                # NaN is not close either; and all ranks do what the most careful one wants.
                if not self._ranks.any(not close):
                    return Verdict(layout, *found, refused="; ".join(reasons))
                reasons.append(
                    f"the {layout} layout changes the loss by {found[0]:.1e} and the gradients by {found[1]:.1e} of "
                    "their size"
                )
        usual_attention(base)
        unfuse_lora(self._model)
        return Verdict(BatchLayout.PADDED, refused="; ".join(reasons))

    def _outcome(self, batches: list[Batch | Pack]) -> tuple[float, list[torch.Tensor]]:
        """Sum of the losses, and this rank's part of the gradients."""
        self._model.zero_grad()
        try:
            loss = float(self._passes(self._wrapped, batches))
            return loss, [_gradient(parameter) for parameter in self._trained]
        finally:
            self._model.zero_grad()

    def _norm(self, gradients: Any) -> float:
        squares = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        # Over all ranks: of a sharded model each holds a part; of others all hold the same, which counts alike above
        # and below the line.
        return float(self._ranks.sums([float(squares)])[0] ** 0.5)

    def _try_dropout(self, pack: Batch | Pack) -> None:
        """Let layers refuse what they only do in training; the random numbers are given back."""
        device = self._passes.device
        devices = [device] if device.type == "cuda" else []
        with _modes_kept(self._model), torch.random.fork_rng(devices), torch.no_grad():
            self._model.train()
            with self._passes.forward(self._wrapped, pack):
                pass


def sample_of(rows: Sequence[list[TokenPair]], tokens: int) -> list[TokenPair]:
    """A few sequences of `rows` that would show a difference: the two with the longest common beginning, the longest
    and the shortest, as far as `tokens` allow.

    Those that are too long are cut, a common beginning at its front, the rest at its end. Where none have a beginning
    in common, one is made that begins as another does. Each trains its last tokens too: of very few the output head's
    gradient is so inexact (in float32 a hundred times more than of many) that nothing could be told from it.
    """
    ordered = sorted((sequence for row in rows for sequence in row), key=lambda sequence: lexicographic(sequence[0]))
    by_length = sorted(ordered, key=lambda sequence: len(sequence[0]))
    shared = [common_beginning(a[0], b[0]) for a, b in itertools.pairwise(ordered)]
    if shared and max(shared) >= MIN_SHARED:
        first = shared.index(max(shared))
        chosen = [_cut(sequence, shared[first], tokens // 4) for sequence in ordered[first : first + 2]]
    else:
        longest, shortest = (_cut(sequence, 0, tokens // 3) for sequence in (by_length[-1], by_length[0]))
        chosen = [longest, _beginning_as(longest, shortest)]
    for sequence in (by_length[-1], by_length[0]):
        if _tokens([*chosen, sequence]) <= tokens and all(sequence[0] is not other[0] for other in chosen):
            chosen.append(sequence)
    return [(ids, trained | (np.arange(len(ids)) >= len(ids) - _TRAINED_TOKENS)) for ids, trained in chosen]


def _cut(sequence: TokenPair, shared: int, most: int) -> TokenPair:
    """At most `most` of its `shared` first tokens and as many others."""
    ids, trained = (part[max(0, shared - most) : shared + most] for part in sequence)
    return ids, trained


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """`model` in evaluation mode, but for what decides whether activations are checkpointed."""
    with _modes_kept(model):
        model.eval()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.training = True
        yield


@contextmanager
def _modes_kept(model: Any) -> Iterator[None]:
    """Each module trains or not afterwards as it did before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _beginning_as(first: TokenPair, second: TokenPair) -> TokenPair:
    """A sequence of the first half of `first` and all of `second`."""
    half = max(len(first[0]) // 2, 1)
    return np.concatenate([first[0][:half], second[0]]), np.concatenate([first[1][:half], second[1]])


def _tokens(sequences: Sequence[TokenPair]) -> int:
    return sum(len(ids) for ids, _ in sequences)


def _refusal(error: Exception) -> str:
    return str(error) if isinstance(error, PackingRefusedError) else f"packs cannot be computed here ({quoted(error)})"


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of this rank's part of it."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    local: torch.Tensor = getattr(gradient, "_local_tensor", gradient)
    return local.detach().clone()
