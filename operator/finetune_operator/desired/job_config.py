"""The ConfigMap of an attempt: the job as it is trained, and as it was written."""

from __future__ import annotations

import json
from typing import Any

from finetune_api.job import FineTuneJob, Published, WhereItRuns
from finetune_api.job_file import job_json
from finetune_api.spec_size import SPEC_LIMIT_BYTES, SPEC_LIMIT_VALUES, has_more_values, may_have_more_values
from finetune_api.training import WhatToTrain
from finetune_operator.desired.effective import effective_job
from finetune_operator.desired.metadata import child_metadata
from finetune_operator.names import JOB_FILE_KEY, PLACEMENT_KEY, SPEC_KEY
from finetune_operator.settings import OperatorSettings

_IMMUTABLE_KEYS = set(WhatToTrain.model_fields) | set(Published.model_fields)
_PLACEMENT_KEYS = set(WhereItRuns.model_fields)
_RECORD_LIMIT = 4 * SPEC_LIMIT_BYTES
"""Characters of the longest record that is read: another version may have written more spaces and escapes."""


def job_config_map(job: FineTuneJob, attempt: int, settings: OperatorSettings) -> dict[str, Any]:
    """The immutable ConfigMap of attempt number `attempt`, from 1.

    Args:
        job: as its author wrote it, for its second key; the first holds `effective_job`.
        attempt: number of the attempt.
        settings: the operator's.
    """
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(job, attempt),
        "immutable": True,
        "data": config_data(job, settings),
    }


def config_data(job: FineTuneJob, settings: OperatorSettings) -> dict[str, str]:
    """The ConfigMap's keys and texts."""
    return {
        JOB_FILE_KEY: job_json(effective_job(job, settings)),
        SPEC_KEY: immutable_spec(job),
        PLACEMENT_KEY: placement(job),
    }


def immutable_spec(job: FineTuneJob) -> str:
    """The keys that may not change, as their author wrote them, in JSON.

    Without defaults, so that an operator with other defaults does not take its own change for the author's.
    """
    return _as_json(_written(job, _IMMUTABLE_KEYS))


def placement(job: FineTuneJob) -> str:
    """The keys about where the job runs, as their author wrote them, in JSON. Of its labels, none: the PyTorchJob of an
    attempt keeps the queue and the priority that it was created with, and says so itself."""
    return _as_json(_written(job, _PLACEMENT_KEYS))


def same_training(recorded: str | None, job: FineTuneJob) -> bool:
    """Whether `job` says of what is trained what an attempt's record of it says.

    Compared are values, not texts: another version may have written the same ones in other words. A record that is not
    there, or is none, tells nothing. Nor does one that is larger than a spec may be: whoever may write ConfigMaps may
    put another in its place.

    Args:
        recorded: what `immutable_spec` gave when the attempt was created, in any version; None when there is none.
        job: as its author wrote it.
    """
    return _same(recorded, _written(job, _IMMUTABLE_KEYS))


def same_placement(recorded: str | None, job: FineTuneJob) -> bool:
    """Whether `job` says of where it runs what an attempt's record of it says; as `same_training`.

    Args:
        recorded: what `placement` gave when the attempt was created; None when there is none.
        job: as its author wrote it.
    """
    return _same(recorded, _written(job, _PLACEMENT_KEYS))


def _written(job: FineTuneJob, keys: set[str]) -> dict[str, Any]:
    return job.spec.model_dump(exclude_unset=True, include=keys)


def _as_json(written: dict[str, Any]) -> str:
    return json.dumps(written, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _same(recorded: str | None, written: dict[str, Any]) -> bool:
    if recorded is None or len(recorded) > _RECORD_LIMIT or may_have_more_values(recorded, SPEC_LIMIT_VALUES):
        return True
    try:
        record = json.loads(recorded)
        known = isinstance(record, dict) and not has_more_values(record, SPEC_LIMIT_VALUES)
        return not known or _meaning(record) == _meaning(written)
    except (ValueError, RecursionError):
        return True


def _meaning(value: Any) -> Any:
    """`value` so that what is equal to a reader of JSON is equal, and nothing else: 1 and 1.0, but not 1 and true."""
    if isinstance(value, dict):
        return {key: _meaning(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_meaning(inner) for inner in value]
    # JSON has no tuples.
    return (value,) if isinstance(value, bool) else value
