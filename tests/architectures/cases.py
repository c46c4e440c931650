"""Everything the matrix examines: each type as it trains, and each way to publish one that must not be trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.training import Quantization
from tests.architectures.zoo import INCOMPLETE, MODEL_TYPES, NOT_CAUSAL, build


@dataclass(frozen=True)
class Case:
    """One folder to train from."""

    name: str
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    saved_as: str | None = None
    why_not: str = ""
    """Why it must not be trained."""
    quantization: Quantization | None = None
    """Of the base model while it is trained on."""

    def build(self, folder: Path) -> Path:
        """Save the model in `folder`."""
        return build(self.model_type, folder, saved_as=self.saved_as, **self.changes)


def _cases() -> dict[str, Case]:
    found = [
        Case(name, name, why_not="it sees the answer" if NOT_CAUSAL.get(name) == {} else "") for name in MODEL_TYPES
    ]
    for name, changes in NOT_CAUSAL.items():
        if changes:
            shown = ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items() if "num_" not in key)
            found.append(Case(f"{name} ({shown})", name, changes, why_not="it sees the answer"))
    for name, saved_as in INCOMPLETE.items():
        found.append(Case(f"{name} ({saved_as})", name, {}, saved_as, why_not="weights are missing"))
    return {case.name: case for case in found}


CASES = _cases()
"""By name, the plain types first."""
