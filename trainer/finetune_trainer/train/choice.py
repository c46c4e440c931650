"""Decides, before the first step, how rows become batches on this model and this device.

A short row is run to see what the backward pass keeps of a token; from that follow whether activations are
checkpointed and how many tokens a pack may have. Then the gate says which layout is exact. All ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.outcome import BatchLayout
from finetune_trainer.model.batch import TokenPair, pad
from finetune_trainer.model.packed_attention import chooses_among_equals, most_tokens
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.gate import Gate, Verdict, without_dropout
from finetune_trainer.train.memory import (
    KeptBytes,
    checkpointed_bytes_per_token,
    enough_tokens,
    tokens_that_fit,
)
from finetune_trainer.train.passes import Passes
from finetune_trainer.train.sample import SAMPLE_TOKENS, sample_of

_USEFUL_TOKENS = 2048
"""Packs this large use a device well; where fewer fit, recomputing activations costs less than smaller packs."""

_MEASURED_TOKENS = 128
"""Tokens of the row that shows what is kept of each."""

_STEP = 256
"""Packs are bounded by a multiple of this, so that a little more or less free memory makes the same packs."""


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
    checkpointing: bool
    verdict: Verdict

    def figures(self) -> dict[str, object]:
        """For metrics.jsonl and the checkpoints."""
        return {
            "batching": self.batching.layout,
            "tokens_per_pack": self.batching.tokens_per_pack if self.batching.packs else None,
            "activation_checkpointing": self.checkpointing,
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
        checkpointing = "; activations are computed again in the backward pass" if self.checkpointing else ""
        return (
            f"Rows lie in packs of at most {self.batching.tokens_per_pack:,} tokens, {shared}{checkpointing} (checked "
            f"on real rows: the gradients differ from one row at a time by {difference:.0e} of their size; "
            f"{self.verdict.seconds:.1f} s)."
        )

    def warning(self) -> str | None:
        """Why it is not the fastest layout."""
        if not self.verdict.refused:
            return None
        return f"For this model {_LAID_OUT[self.batching.layout]}: {self.verdict.refused}."

    @property
    def _shares(self) -> bool:
        return self.batching.layout is BatchLayout.SHARED_PREFIX


class Chooser:
    """Makes the choice for one model.

    Args:
        model: the PeftModel, not wrapped.
        wrapped: the same as training runs it.
        passes: forward and backward passes as training makes them.
        ranks: this process among the others.
        checkpointing: whether activations are checkpointed; None to decide it here.
        sharded: by FSDP.
    """

    def __init__(
        self,
        model: Any,
        wrapped: Any,
        passes: Passes,
        ranks: Ranks,
        *,
        checkpointing: bool | None,
        sharded: bool = False,
    ) -> None:
        self._model = model
        self._wrapped = wrapped
        self._passes = passes
        self._ranks = ranks
        self._checkpointing = checkpointing
        self._sharded = sharded

    def choose(
        self, rows: list[list[TokenPair]], batching: Batching, *, longest: int, earlier: Mapping[str, Any] | None
    ) -> Choice:
        """The choice.

        Args:
            rows: some of the data, the same on all ranks.
            batching: the first layout to try; where that is padded rows, no packs are.
            longest: tokens of the longest row.
            earlier: `Choice.figures` of the attempt that is continued: its packs are made again where they still fit,
                so that a resumed run rounds as an undisturbed one.
        """
        shortest = min((sequence for row in rows for sequence in row), key=lambda sequence: len(sequence[0]))
        kept = self._kept_bytes_per_token(shortest, batching)
        checkpointing, fitting = self._agreed(kept, longest)
        tokens = min(fitting, enough_tokens(self._passes.device))
        known = (earlier or {}).get("tokens_per_pack")
        if isinstance(known, int) and known <= fitting:
            tokens = known
        tokens = min(tokens, most_tokens(self._model.get_base_model()) or tokens)
        batching = replace(batching, tokens_per_pack=tokens)
        gate = Gate(self._model, self._wrapped, self._passes, self._ranks, sharded=self._sharded)
        sample = sample_of(rows, min(SAMPLE_TOKENS[self._passes.device.type], tokens))
        one_by_one = chooses_among_equals(self._model.get_base_model(), longest)
        if one_by_one is None:
            verdict = gate.choose(sample, batching)
        else:
            padded = gate.choose(sample, replace(batching, layout=BatchLayout.PADDED))
            verdict = Verdict(BatchLayout.SINGLE_ROWS, refused=one_by_one, seconds=padded.seconds)
        batching = replace(batching, layout=verdict.layout, whole_rows=verdict.rows_apart > 0)
        return Choice(batching, checkpointing, verdict)

    def _kept_bytes_per_token(self, sequence: TokenPair, batching: Batching) -> float:
        ids, trained = (part[:_MEASURED_TOKENS] for part in sequence)
        counter = KeptBytes(self._model)
        with without_dropout(self._model), counter.counting():
            self._passes(self._wrapped, [pad([(ids, trained)], batching.pad_id)], reduce=self._sharded)
        self._model.zero_grad()
        return counter.total / len(ids)

    def _agreed(self, kept: float, longest: int) -> tuple[bool, int]:
        """Whether activations are checkpointed, and how many tokens then fit."""
        config = self._model.get_base_model().config.get_text_config()
        dtype = self._model.get_base_model().dtype
        if self._checkpointing:
            per_token = checkpointed_bytes_per_token(config, 0, dtype)
            return True, self._least(max(per_token, kept))
        fitting = self._least(kept)
        if self._checkpointing is False or fitting >= max(longest, _USEFUL_TOKENS):
            return False, fitting
        if not checkpoint_activations(self._model):
            return False, fitting
        return True, self._least(checkpointed_bytes_per_token(config, kept, dtype))

    def _least(self, bytes_per_token: float) -> int:
        """Tokens that fit on the rank with the least memory."""
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        # Gradients and AdamW's two moments.
        reserved = 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
        fitting = tokens_that_fit(
            bytes_per_token, device=self._passes.device, processes=self._ranks.local_world_size, reserved=reserved
        )
        least = int(min(self._ranks.gather(fitting)))
        return max(_STEP, math.floor(least / _STEP) * _STEP)


def checkpoint_activations(model: Any) -> bool:
    """Compute activations again in the backward pass from now on; whether the model knows how."""
    base = model.get_base_model()
    if not getattr(base, "supports_gradient_checkpointing", False):
        return False
    base.gradient_checkpointing_enable({"use_reentrant": False})
    return True
