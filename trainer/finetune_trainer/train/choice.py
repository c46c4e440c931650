"""Decides, before the first step, how rows become batches on this model and this device.

A short row is run to see what the backward pass keeps of a token; from that follow whether activations are
checkpointed and how many tokens a pack may have. Then the gate says which layout is exact. All ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune_api.outcome import BatchLayout
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import TokenPair, pad
from finetune_trainer.model.packed_attention import chooses_among_equals, most_tokens
from finetune_trainer.model.prefix_tree import PrefixedPacks
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.gate import Gate, Verdict, without_dropout
from finetune_trainer.train.memory import (
    KeptBytes,
    checkpointed_bytes_per_token,
    enough_tokens,
    prefix_bytes_per_token,
    tokens_that_fit,
)
from finetune_trainer.train.remembered import Measured, Remembered
from finetune_trainer.train.sample import SAMPLE_TOKENS, sample_of

_USEFUL_TOKENS = 2048
"""Packs this large use a device well; where fewer fit, recomputing activations costs less than smaller packs."""

_MEASURED_TOKENS = 128
"""Tokens of the row that shows what is kept of each."""

_STEP = 256
"""Packs are bounded by a multiple of this, so that a little more or less free memory makes the same packs."""


CHECKPOINTED = {
    1: "activations are computed again in the backward pass",
    2: "activations of every second layer are computed again in the backward pass",
    4: "activations of every fourth layer are computed again in the backward pass",
}
"""By `Choice.checkpointed`; a layer that keeps its activations spares a third of its time."""

_LAID_OUT = {
    BatchLayout.SHARED_PREFIX: "rows are packed",
    BatchLayout.PACKED: "rows are packed without sharing their beginnings",
    BatchLayout.PADDED: "rows are padded",
    BatchLayout.SINGLE_ROWS: "one row is computed at a time, which is slow",
}


@dataclass(frozen=True)
class Choice:
    """What was decided."""

    batching: Batching
    checkpointed: int
    """Activations of every so many-th layer are computed again in the backward pass: 1 is all, 0 none."""
    verdict: Verdict
    may_checkpoint: bool = False
    """Whether the job leaves open that activations are checkpointed, should memory ask for it."""

    def figures(self) -> dict[str, object]:
        """For metrics.jsonl and the checkpoints."""
        return {
            "batching": self.batching.layout,
            "tokens_per_pack": self.batching.tokens_per_pack if self.batching.packs else None,
            "activation_checkpointing": self.checkpointed > 0,
            "checkpointed_every": self.checkpointed or None,
            "gate_loss_difference": self.verdict.loss_difference,
            "gate_gradient_difference": self.verdict.gradient_difference,
            "gate_seconds": round(self.verdict.seconds, 3),
        }

    def sentence(self) -> str:
        """For the log."""
        if not self.batching.packs:
            return f"{_LAID_OUT[self.batching.layout].capitalize()}."
        shared = "what rows begin with alike is computed once" if self._shares else "each row is computed whole"
        difference = self.verdict.gradient_difference or 0.0
        when = "in an earlier run" if self.verdict.earlier else f"{self.verdict.seconds:.1f} s"
        checkpointing = f"; {CHECKPOINTED[self.checkpointed]}" if self.checkpointed else ""
        return (
            f"Rows lie in packs of at most {self.batching.tokens_per_pack:,} tokens, {shared}{checkpointing} (checked "
            f"on real rows: the gradients differ from one row at a time by {difference:.0e} of their size; "
            f"{when})."
        )

    def warning(self) -> str | None:
        """Why it is not the fastest layout."""
        if not self.verdict.refused:
            return None
        return f"For this model {_LAID_OUT[self.batching.layout]}: {self.verdict.refused}."

    @property
    def _shares(self) -> bool:
        return self.batching.layout is BatchLayout.SHARED_PREFIX


def choose(
    model: AdaptedModel,
    ranks: Ranks,
    rows: list[list[TokenPair]],
    batching: Batching,
    *,
    checkpointing: bool | None,
    longest: int,
    earlier: Mapping[str, Any] | None = None,
    bound: int | None = None,
    remembered: Remembered | None = None,
) -> Choice:
    """The choice; the model is left as it needs it.

    Args:
        model: is trained.
        ranks: this process among the others.
        rows: some of the data, the same on all ranks.
        batching: the first layout to try; where that is padded rows, no packs are.
        checkpointing: whether the job wants activations checkpointed; None to decide it by memory.
        longest: tokens of the longest row.
        earlier: `Choice.figures` of the attempt that is continued: its packs are made again where they still fit, so
            that a resumed run rounds as an undisturbed one.
        bound: most tokens of a pack, where an attempt before ran out of memory.
        remembered: what may be known of this case, and where it is kept.

    Raises:
        JobError: ModelUnsupported, the model is not causal.
    """
    asked = True if checkpointing is None and model.sharded else checkpointing
    known = ranks.on_first(remembered.recall) if remembered is not None else None
    if known is None:
        measured = max((sequence for row in rows for sequence in row), key=lambda sequence: len(sequence[0]))
        kept = _kept_bytes_per_token(model, measured, batching.pad_id)
    else:
        kept = known.kept_bytes_per_token
    checkpointed, fitting = _room(model, ranks, kept, asked, longest)
    tokens = min(fitting, enough_tokens(model.device))
    before = earlier.get("tokens_per_pack") if isinstance(earlier, dict) else None
    if isinstance(before, int) and 0 < before <= fitting:
        tokens = before
    most = most_tokens(model.base)
    tokens = min(tokens, most or tokens, bound or tokens)
    batching = replace(batching, tokens_per_pack=tokens)
    # Sharded models have to run equally many passes on all ranks; and what bounds packs may be that places are counted
    # from where a pass begins.
    if batching.packs and not model.sharded and most is None:
        prefixed = replace(batching, prefixes=True, prefix_cost=_prefix_cost(model, kept, checkpointed))
        wanted = any(isinstance(batch, PrefixedPacks) for batch in prefixed.batches(rows))
        batching = replace(prefixed, prefixes=not ranks.any(not wanted))
    gate = Gate(model, ranks)
    sample_tokens = min(SAMPLE_TOKENS[model.device.type], tokens)
    sample = sample_of(rows, sample_tokens)
    one_by_one = chooses_among_equals(model.base, longest)
    if one_by_one is not None:
        padded = gate.choose(sample, replace(batching, layout=BatchLayout.PADDED))
        verdict = Verdict(BatchLayout.SINGLE_ROWS, refused=one_by_one, seconds=padded.seconds)
    else:
        case = (sample_tokens, checkpointed, batching.prefixes)
        same = known is not None and (known.sample_tokens, known.checkpointed, known.prefixes_asked) == case
        found = gate.as_before(known) if known is not None and same else None
        verdict = found or gate.choose(sample, batching)
        if remembered is not None and ranks.is_first and _is_simple(verdict):
            remembered.keep(
                Measured(
                    kept_bytes_per_token=kept,
                    sample_tokens=sample_tokens,
                    checkpointed=checkpointed,
                    prefixes_asked=batching.prefixes,
                    prefixes=verdict.prefixes,
                    loss_difference=verdict.loss_difference or 0.0,
                    gradient_difference=verdict.gradient_difference or 0.0,
                )
            )
    batching = replace(batching, layout=verdict.layout, prefixes=verdict.prefixes, whole_rows=verdict.rows_apart > 0)
    if batching.layout is BatchLayout.PADDED:
        fit = _power_of_two(fitting // max(longest, batching.length or 0))
        batching = replace(batching, rows_per_batch=min(batching.rows_per_batch, fit))
    return Choice(batching, checkpointed, verdict, may_checkpoint=asked is None)


def _prefix_cost(model: AdaptedModel, kept: float, checkpointed: int) -> float:
    """Of how many tokens a token of a prefix takes the memory."""
    config = model.base.config.get_text_config()
    each = _bytes_per_token(model, kept, checkpointed)
    return 1 + prefix_bytes_per_token(config, model.dtype, checkpointed=checkpointed > 0) / max(each, 1.0)


def _is_simple(verdict: Verdict) -> bool:
    """Whether another run need only do the same: nothing was refused, and no layer computes rows apart."""
    plain = verdict.layout is BatchLayout.SHARED_PREFIX and not verdict.refused and not verdict.rows_apart
    return plain and not verdict.earlier


def _power_of_two(number: int) -> int:
    """The largest that is not above `number`, at least 1: a little more or less memory then makes the same batches."""
    return 1 << max(number.bit_length() - 1, 0)


def _kept_bytes_per_token(model: AdaptedModel, sequence: TokenPair, pad_id: int) -> float:
    """What the backward pass keeps of a token: the difference of two rows, in which all that is kept of any row (logits
    of its last token, weights that were gathered or cast) cancels out.
    """
    long = min(len(sequence[0]), _MEASURED_TOKENS)
    short = max(1, long // 2)
    kept = []
    with without_dropout(model.peft):
        for tokens in (long, short):
            last = np.arange(tokens) == tokens - 1
            counter = KeptBytes(model.peft)
            with counter.counting():
                loss, _ = model.loss(pad([(sequence[0][:tokens], last)], pad_id))
            if model.sharded:
                # Weights that were gathered are shared out again.
                torch.autograd.backward(loss)
            del loss
            kept.append(counter.total)
    model.peft.zero_grad()
    return (kept[0] - kept[1]) / (long - short) if long > short else kept[0]


def _room(model: AdaptedModel, ranks: Ranks, kept: float, asked: bool | None, longest: int) -> tuple[int, int]:
    """Of how many layers activations are checkpointed (`Choice.checkpointed`): of as few as let enough tokens fit; and
    how many then fit on the rank with the least memory.

    Args:
        model: is trained.
        ranks: this process among the others.
        kept: bytes that the backward pass keeps of a token.
        asked: None where both are possible.
        longest: tokens of the longest row.
    """

    def fitting(every: int) -> int:
        return _fitting(model, ranks, _bytes_per_token(model, kept, every))

    if asked and model.checkpoint_activations():
        return 1, fitting(1)
    enough, whole = max(longest, _USEFUL_TOKENS), fitting(0)
    if asked is False or whole >= enough or not model.checkpoint_activations():
        return 0, whole
    checkpointed = next((every for every in (4, 2) if fitting(every) >= enough), 1)
    model.checkpoint_activations(checkpointed)
    return checkpointed, fitting(checkpointed)


def _bytes_per_token(model: AdaptedModel, kept: float, every: int) -> float:
    """What a token takes where every so many-th layer is computed again; `kept` where none is."""
    if not every:
        return kept
    return checkpointed_bytes_per_token(model.base.config.get_text_config(), kept, model.dtype, every)


def _fitting(model: AdaptedModel, ranks: Ranks, bytes_per_token: float) -> int:
    # Gradients and AdamW's two moments.
    reserved = 3 * sum(parameter.numel() * parameter.element_size() for parameter in model.trained)
    fitting = tokens_that_fit(bytes_per_token, device=model.device, processes=ranks.local_world_size, reserved=reserved)
    least = int(min(ranks.gather(fitting)))
    return max(_STEP, math.floor(least / _STEP) * _STEP)
