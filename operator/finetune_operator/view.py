"""One job as it was seen at one moment: what the acting side of a reconcile is given."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.cache import CachedJob, ParsedSpec
from finetune_operator.policy.plan import ObservedState
from finetune_operator.wire import Raw


@dataclass(frozen=True)
class View:
    """A job, and what of it the policies decide by."""

    cached: CachedJob
    raw: Raw
    """The FineTuneJob; without its spec where that is parsed already."""
    spec: ParsedSpec
    observed: ObservedState
    live: bool
    """Everything in it was read just now."""
