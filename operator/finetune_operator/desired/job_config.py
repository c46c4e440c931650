"""The ConfigMap of an attempt: the job as it is trained, and as it was written."""

from __future__ import annotations

import json
from typing import Any

from finetune_api.job import FineTuneJob, Published, WhereItRuns
from finetune_api.job_file import job_json
from finetune_api.training import WhatToTrain
from finetune_operator.desired.effective import effective_job
from finetune_operator.desired.metadata import child_metadata
from finetune_operator.names import JOB_FILE_KEY, PLACEMENT_KEY, SPEC_KEY
from finetune_operator.settings import OperatorSettings

_IMMUTABLE_KEYS = set(WhatToTrain.model_fields) | set(Published.model_fields)
_PLACEMENT_KEYS = set(WhereItRuns.model_fields)


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
    """The keys that may not change, as their author wrote them: JSON that is equal for equal keys.

    Without defaults, so that an operator with other defaults does not take its own change for the author's.
    """
    return _as_written(job, _IMMUTABLE_KEYS)


def placement(job: FineTuneJob) -> str:
    """The keys about where the job runs, as their author wrote them; JSON that is equal for equal keys."""
    return _as_written(job, _PLACEMENT_KEYS)


def _as_written(job: FineTuneJob, keys: set[str]) -> str:
    written = job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True, include=keys)
    return json.dumps(written, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
