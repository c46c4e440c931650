"""The exactness gate: before the first step, rows are laid out together only if that changes nothing for this model.

Loss and adapter gradients of a few real rows are computed one row at a time by the model's own code, and again in
packs. Where they differ the next simpler layout is tried: padded rows, and in the end one row at a time. That a model
reads position ids and leaves attention to transformers' interface is thereby measured, not believed; and so is that it
is causal, without which it would learn to copy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune_api.outcome import BatchLayout, Reason
from finetune_trainer.errors import JobError
from finetune_trainer.launch.failures import out_of_memory, quoted
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import IGNORED, Batch, TokenPair, pad
from finetune_trainer.model.decoder import decoder_of
from finetune_trainer.model.modes import modes_kept
from finetune_trainer.model.packed_attention import PackingRefusedError
from finetune_trainer.model.packing import behind_one_prefix, packs_of
from finetune_trainer.model.prefix_tree import AnyBatch, Node, Pack
from finetune_trainer.model.row_layers import RowLayer, compute_rows_apart, find_row_layers, usual_layers
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.remembered import Measured
from finetune_trainer.train.sample import beginning_of

Differences = tuple[float, float]
"""Relative ones, of (loss, whole gradient)."""

_CLOSE: Differences = (1e-5, 1e-4)
"""What rounding alone makes in float32. A row that sees another's tokens, or stands in the wrong place, makes more."""

_CLOSE_PADDED: Differences = (1e-4, 1e-3)
"""The same for padded rows, where the only other choice is far slower and what is wrong is so by percents."""

_CLOSE_HALF: tuple[Differences, Differences] = ((2e-2, 1e-1), (1e-1, 3e-1))
"""Least and most that is let pass in half precision. Rounding grows with a model's depth there and is measured: by
padding, which changes shapes and kernels as packs do."""

_CAUSAL_TOKENS = 256
"""Of a row, that show whether a model sees ahead."""

_TIMES_ROUNDING = 3.0

_SEES_AHEAD = {torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative change of logits that are to have none, by precision: the shapes are the same, so all there is comes from
mixtures of experts, which group other tokens. In float32 it is 1e-5."""

_LEAKS = 1e-6
"""The same of a loss; where experts make more of it, that is measured."""

_TIMES_GROUPING = 10.0

_WHAT_CHANGES = {
    BatchLayout.SHARED_PREFIX: "computing common beginnings once",
    BatchLayout.PACKED: "packing",
    BatchLayout.PADDED: "padding, or other rows beside a row,",
}


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
    prefixes: bool = False
    """Whether packs may lie behind a common prefix that is computed once for all of them."""
    rows_apart: int = 0
    """Layers that compute each row of a pack for itself."""
    seconds: float = 0.0
    earlier: bool = False
    """It is that of an earlier run of the very same case."""


_Outcome = tuple[float, list[torch.Tensor]]
"""Sum of the losses, and the gradients."""


class Gate:
    """Compares layouts on one model.

    Args:
        model: is left as the layout that was chosen needs it.
        ranks: this process among the others.
    """

    def __init__(self, model: AdaptedModel, ranks: Ranks) -> None:
        self._model = model
        self._ranks = ranks
        self._half = model.dtype in _SEES_AHEAD

    def choose(self, sample: Sequence[TokenPair], batching: Batching) -> Verdict:
        """The first layout from that of `batching` on that is exact; the model is left as that layout needs it.

        Args:
            sample: sequences, the same on all ranks.
            batching: gives the bound of a pack.

        Raises:
            JobError: ModelUnsupported, the model is not causal.
        """
        began = time.monotonic()
        with without_dropout(self._model.peft):
            for sequence in (sample[0], sample[-1]):
                ids, _ = beginning_of(sequence, _CAUSAL_TOKENS)
                self._check_causality(pad([(ids, np.ones(len(ids), dtype=bool))], batching.pad_id))
            verdict = self._choose(sample, batching)
        return replace(verdict, seconds=time.monotonic() - began)

    def as_before(self, measured: Measured) -> Verdict | None:
        """What was found of this very case before; the model is left as that needs it. None where it cannot be."""
        self._model.fuse()
        refused = False
        try:
            self._model.take_packs()
        except PackingRefusedError:
            refused = True
        if self._ranks.any(refused):
            self._model.leave_packs()
            self._model.unfuse()
            return None
        return Verdict(
            BatchLayout.SHARED_PREFIX,
            measured.loss_difference,
            measured.gradient_difference,
            prefixes=measured.prefixes,
            earlier=True,
        )

    def _check_causality(self, row: Batch) -> None:
        """Refuse a model whose predictions change with a token that comes after all of them."""
        changed = row.input_ids.clone()
        changed[0, -1] = next(token for token in (*changed[0].tolist(), 0, 1) if token != changed[0, -1])
        change = self._logit_change(row, replace(row, input_ids=changed))
        most = _SEES_AHEAD.get(self._model.dtype, 1e-5)
        if change > most:
            # Some draw random numbers: Reformer's hashes.
            most = max(most, _TIMES_GROUPING * self._logit_change(row, row))
        if self._ranks.any(change > most):
            raise JobError(
                Reason.MODEL_UNSUPPORTED,
                "The model sees the tokens it is to predict, so it would learn nothing: where only the last token of "
                f"a row is another, the logits of the tokens before it change by {change:.0e} of their size. Choose a "
                "causal language model (an encoder such as BERT is one only where its config.json says is_decoder: "
                "true).",
            )

    def _logit_change(self, row: Batch, other: Batch) -> float:
        logits, others = (self._model.logits(which).float() for which in (row, other))
        return float((others - logits).norm() / logits.norm())

    def _choose(self, sample: Sequence[TokenPair], batching: Batching) -> Verdict:
        alone = self._outcome([pad([sequence], batching.pad_id) for sequence in sample])
        # From here on: in half precision it rounds otherwise, which the noise that is measured has to include.
        self._model.fuse()
        padded = self._compare_padded(alone, sample, batching) if self._half or not batching.packs else None
        refused: dict[str, None] = {}
        if batching.packs:
            verdict = self._choose_pack(alone, sample, batching, self._close(padded), refused)
            if verdict is not None:
                return verdict
        padded = padded or self._compare_padded(alone, sample, batching)
        if padded is None:
            # A step that does not fit is made again in smaller parts; a comparison need not be.
            return Verdict(BatchLayout.PADDED, refused="; ".join(refused))
        found = _within(
            padded, _CLOSE_HALF[1] if self._half else _CLOSE_PADDED, _WHAT_CHANGES[BatchLayout.PADDED], refused
        )
        if found is None:
            self._model.unfuse()
            return Verdict(BatchLayout.SINGLE_ROWS, refused="; ".join(refused))
        return Verdict(BatchLayout.PADDED, *found, refused="; ".join(refused))

    def _compare_padded(
        self, alone: _Outcome, sample: Sequence[TokenPair], batching: Batching
    ) -> Differences | str | None:
        """As `_compare`, of padded rows: together, or one by one where memory asks for it; None where there is none."""
        # As wide as the longest row, or some wider where all are to be as wide as one that may come.
        width = min(batching.length or 0, 2 * max(len(ids) for ids, _ in sample))
        for rows in (len(sample), 1):
            padded = replace(batching, layout=BatchLayout.PADDED, rows_per_batch=rows, length=width)
            found = self._compare(alone, sample, padded)
            if found is not None:
                return found
        return None

    def _choose_pack(
        self,
        alone: _Outcome,
        sample: Sequence[TokenPair],
        batching: Batching,
        close: Differences,
        refused: dict[str, None],
    ) -> Verdict | None:
        """The first kind of packs that is exact, or None; `refused` gets the reasons why others are not."""
        try:
            self._model.take_packs()
        except PackingRefusedError as error:
            refused[str(error)] = None
            return None
        apart = self._row_layers(sample[0][0], refused)
        if apart is not None:
            compute_rows_apart(apart)
            for layout in (BatchLayout.SHARED_PREFIX, BatchLayout.PACKED):
                prefixes = batching.prefixes and layout is BatchLayout.SHARED_PREFIX and not apart
                laid_out = replace(batching, layout=layout, prefixes=prefixes, whole_rows=bool(apart))
                compared = self._compare(alone, sample, laid_out) or "a pack of a few rows has no room in memory"
                found = _within(compared, close, _WHAT_CHANGES[layout], refused)
                if found is not None:
                    prefixes = laid_out.prefixes and self._takes_prefix(alone, sample, close, refused)
                    return Verdict(layout, *found, refused="; ".join(refused), prefixes=prefixes, rows_apart=len(apart))
            usual_layers(apart)
        self._model.leave_packs()
        return None

    def _takes_prefix(
        self, alone: _Outcome, sample: Sequence[TokenPair], close: Differences, refused: dict[str, None]
    ) -> bool:
        """Whether packs behind a common prefix are exact too; the sample begins with the rows that share most."""
        prefixed = behind_one_prefix(sample[:2])
        if prefixed is None:
            return False
        rest = packs_of(sample[2:], budget=sum(len(ids) for ids, _ in sample), share=True) if sample[2:] else []
        compared = self._compare_batches(alone, [prefixed, *rest]) or "a prefix and a row have no room in memory"
        return _within(compared, close, "computing a beginning once for several packs", refused) is not None

    def _row_layers(self, ids: Any, refused: dict[str, None]) -> list[RowLayer] | None:
        """Layers that have to be given rows, not packs; None where packs cannot be computed at all."""
        # Together of a number of tokens that is no size of a layer.
        rows = [(np.resize(ids, length), np.ones(length, dtype=bool)) for length in (15, 16)]
        (pack,) = packs_of(rows, budget=32, share=False)
        refusal, found = "", []
        try:
            found = find_row_layers(decoder_of(self._model.base), pack, lambda: self._loss(pack))
        except Exception as error:
            refusal = _refusal(error)
        if self._ranks.any(bool(refusal)):
            refused[refusal or "packs fail in another process"] = None
            return None
        return found

    def _close(self, padded: Differences | str | None) -> Differences:
        """How far packs may be off."""
        if not self._half:
            return _CLOSE
        rounding = padded if isinstance(padded, tuple) else (math.inf, math.inf)
        least, most = (torch.tensor(bound) for bound in _CLOSE_HALF)
        loss, gradient = (_TIMES_ROUNDING * torch.tensor(rounding)).clamp(least, most).tolist()
        return loss, gradient

    def _compare(self, alone: _Outcome, sample: Sequence[TokenPair], batching: Batching) -> Differences | str | None:
        """How far the sample in this layout is from each row `alone`, or why that cannot be told, or None where memory
        ran out; the same on all ranks. Where the base is not sharded none waits for another while it computes.
        """
        first = batching.batches([[beginning_of(sample[0], 16)]])[0] if batching.packs else None
        return self._compare_batches(alone, batching.batches([list(sample)]), first)

    def _compare_batches(
        self, alone: _Outcome, batches: list[AnyBatch], first: AnyBatch | None = None
    ) -> Differences | str | None:
        """As `_compare`, of the sample in these batches; `first` is run with dropout before."""
        refusal, together, leak, fits = "", alone, None, True
        try:
            if first is not None:
                self._try_dropout(first)
            together = self._outcome(batches)
            if self._half:
                leak = next((found for batch in batches if (found := self._leak(batch))), None)
        except Exception as error:  # Model code and kernels that nobody here has seen.
            fits = out_of_memory(error, self._ranks.rank) is None
            refusal = _refusal(error) if fits else ""
        if self._ranks.any(not fits):
            return None
        if self._ranks.any(bool(refusal)):
            return refusal or "rows fail together in another process"
        if self._ranks.any(leak is not None):
            return f"in a pack rows see each other (one that changes changes the loss of others by {leak or 0.0:.0e})"
        loss, gradient = alone
        apart = _norm([b - a for a, b in zip(gradient, together[1], strict=True)])
        own = abs(together[0] - loss) / max(abs(loss), 1e-12), apart / max(_norm(gradient), 1e-12)
        # Kernels may round differently from rank to rank, verdicts must not; and NaN is more than any bound.
        most = np.max(self._ranks.gather(own), axis=0)
        return float(most[0]), float(most[1])

    def _outcome(self, batches: list[AnyBatch]) -> _Outcome:
        """Sum of the losses, and the gradients."""
        self._model.peft.zero_grad()
        try:
            loss = float(self._model.backward(batches))
            return loss, [_gradient(parameter) for parameter in self._model.trained]
        finally:
            self._model.peft.zero_grad()

    def _loss(self, batch: AnyBatch) -> float:
        with torch.no_grad():
            return float(self._model.loss(batch)[0])

    def _leak(self, batch: AnyBatch) -> float | None:
        """Relative change of the other rows' loss when tokens are changed that only the first row of a pack has; None
        where it is no more than what the last row does to the others, who cannot see it.
        """
        if not isinstance(batch, Pack):
            return None
        leaves = [node for node in batch.nodes if node.span_end == node.end]
        noise, change = (self._change_of_others(batch, leaf) for leaf in (leaves[-1], leaves[0]))
        return change if change > max(_LEAKS, _TIMES_GROUPING * noise) else None

    def _change_of_others(self, pack: Pack, leaf: Node) -> float:
        inside = (pack.sources >= leaf.start) & (pack.sources < leaf.end)
        others = replace(pack, targets=pack.targets.masked_fill(inside, IGNORED))
        changed = pack.input_ids.clone()
        # Not only in another order, which attention that has learned nothing yet would not tell.
        changed[:, leaf.start : leaf.end] = changed[:, :1]
        loss, other = self._loss(others), self._loss(replace(others, input_ids=changed))
        return abs(other - loss) / max(abs(loss), 1e-12)

    def _try_dropout(self, pack: AnyBatch) -> None:
        """Let layers refuse what they only do in training; the random numbers are given back."""
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with modes_kept(self._model.peft), torch.random.fork_rng(devices):
            self._model.peft.train()
            self._loss(pack)


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """`model` in evaluation mode, but for what decides whether activations are checkpointed."""
    with modes_kept(model):
        model.eval()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.training = True
        yield


def _within(found: Differences | str, close: Differences, what: str, refused: dict[str, None]) -> Differences | None:
    """`found` if it is close, else None, and `refused` gets the reason, which begins with `what`."""
    if isinstance(found, str):
        refused[found] = None
        return None
    if all(difference <= most for difference, most in zip(found, close, strict=True)):
        return found
    # NaN is not close either.
    refused[f"{what} changes the loss by {found[0]:.1e} and the gradients by {found[1]:.1e} of their size"] = None
    return None


def _refusal(error: Exception) -> str:
    return (
        str(error)
        if isinstance(error, PackingRefusedError)
        else f"rows cannot be computed together here ({quoted(error)})"
    )


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum() ** 0.5)
