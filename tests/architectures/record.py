"""What was found out about one case, and what of it is not as it should be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

Outcome = Literal["trained", "refused", "failed"]

EXACT = 1e-5
"""Most relative difference that rounding in another order makes of the same float32 computation."""

NOTHING_TO_QUANTIZE = "no linear layers that bitsandbytes quantizes"
"""Of the refusal of a model that has none."""

MERGED = 1e-4
"""The same where weights themselves were rounded anew."""


@dataclass
class Record:
    """One case, examined. Differences are relative to the largest value unless said otherwise; None: not measured."""

    name: str
    model_type: str
    why_not: str = ""
    """Why it has to be refused; empty when it has to train."""
    quantization: str | None = None
    """Of the base model while it was trained on."""
    upstream: str = ""
    """What transformers alone fails with, on this very folder."""
    causal: bool | None = None
    """Whether transformers alone gives the same earlier logits when the last token changes."""
    outcome: Outcome = "failed"
    sentence: str = ""
    """Of the refusal or the failure."""
    reason: str = ""
    weights_were_read: bool | None = None
    """Before it was refused."""
    losses: list[float] = field(default_factory=list)
    """On the validation rows, before the first step and after the last."""
    layout: str = ""
    first_loss_difference: float | None = None
    """Of the evaluation before the first step, to transformers alone with one row at a time."""
    last_loss_difference: float | None = None
    """Of the last evaluation, to the published adapter opened by PEFT alone with one row at a time."""
    lost_tensors: list[str] = field(default_factory=list)
    """Of the adapter, when PEFT alone opens it: absent, or not as they were trained."""
    reload_difference: float | None = None
    """Of logits, between the model as it was trained and the published adapter opened by PEFT alone."""
    effect: float | None = None
    """Of logits, between the adapter and the base model."""
    merged_difference: float | None = None
    resumed_difference: float | None = None
    """Of the adapter's weights (absolute), between the run and one that went on from its middle."""
    launched_difference: float | None = None
    """The same to a run by `finetune run`; only of a sample."""
    layers: dict[str, int] = field(default_factory=dict)
    """Number of layers with an adapter, by name."""
    share: float | None = None
    """Of the model's weights, those that have an adapter beside them."""
    parameters: int | None = None
    """That are trained."""
    errors: list[str] = field(default_factory=list)
    """What went wrong after a training that succeeded."""
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def faults(self) -> list[str]:
        """What is wrong, in a few words each; empty when all is well."""
        if self.outcome == "failed":
            return [f"fails: {self.sentence}"]
        if self.outcome == "refused":
            return self._faults_of_a_refusal()
        if self.why_not or self.upstream or self.causal is False:
            return [f"trains, and should not: {self.why_not or self.upstream or 'it is not causal'}"]
        found = list(self.errors)
        if len(self.losses) < 2 or not self.losses[-1] < self.losses[0]:
            found.append(f"the loss does not fall ({' to '.join(f'{loss:.3f}' for loss in self.losses)})")
        if self.lost_tensors:
            found.append(f"{len(self.lost_tensors)} tensors are lost on reload, first {self.lost_tensors[0]}")
        for name, difference, most in (
            ("first loss", self.first_loss_difference, EXACT),
            ("last loss", self.last_loss_difference, EXACT),
            ("reloaded logits", self.reload_difference, EXACT),
            # PEFT merges into codes, which rounds.
            *([] if self.quantization else [("merged logits", self.merged_difference, MERGED)]),
            ("resumed adapter", self.resumed_difference, EXACT),
        ):
            if difference is None and not self.errors:
                found.append(f"{name}: not measured")
            elif difference is not None and not difference <= most:
                found.append(f"{name}: off by {difference:.0e}")
        if self.launched_difference is not None and not self.launched_difference <= EXACT:
            found.append(f"launched adapter: off by {self.launched_difference:.0e}")
        if not self.effect:
            found.append("the adapter changes nothing")
        return found

    def _faults_of_a_refusal(self) -> list[str]:
        found = []
        if self.quantization and NOTHING_TO_QUANTIZE in self.sentence:
            return []
        if not (self.why_not or self.upstream or self.causal is False):
            found.append(f"is refused, and could train: {self.sentence}")
        if self.reason == "InternalError" or "\n" in self.sentence.strip() or len(self.sentence) > 600:
            found.append(f"is not refused with one sentence: {self.sentence[:200]}")
        return found

    def write(self, path: Path) -> None:
        """As JSON, complete or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.rename(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        content: dict[str, Any] = json.loads(path.read_text())
        return cls(**content)
