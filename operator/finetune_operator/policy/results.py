"""From a trainer's last words to what status keeps of them.

The words come from a tenant's container, so what does not fit the schema of status is left out: a status write that
the API server refuses would hide everything else.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from finetune_api.outcome import CheckpointResult, TerminationMessage
from finetune_api.status import Adapter, Checkpoint, Dataset, FineTuneJobStatus, Metrics
from finetune_operator.policy.advance import note_checkpoint

Model = TypeVar("Model", bound=BaseModel)


def adapter_of(words: TerminationMessage) -> Adapter | None:
    """The adapter of an attempt that succeeded, or None when `words` name none that can be one."""
    return _fitting(Adapter, words.adapter) if words.succeeded else None


def keep_results(status: FineTuneJobStatus, words: TerminationMessage) -> None:
    """Copy adapter, data counts and figures into `status`."""
    status.adapter = adapter_of(words)
    status.dataset = _fitting(Dataset, words.dataset) or status.dataset
    status.metrics = _fitting(Metrics, words.metrics) or status.metrics
    keep_checkpoint(status, words.checkpoint)


def keep_checkpoint(status: FineTuneJobStatus, checkpoint: CheckpointResult | None) -> None:
    """Copy the newest checkpoint into `status`; an older one changes nothing."""
    found = _fitting(Checkpoint, checkpoint)
    if found is not None and (status.checkpoint is None or found.step >= status.checkpoint.step):
        note_checkpoint(status, found.step)
        status.checkpoint = found


def _fitting(kind: type[Model], value: BaseModel | None) -> Model | None:
    if value is None:
        return None
    try:
        return kind.model_validate(value.model_dump())
    except ValidationError:
        return None
