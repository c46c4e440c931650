"""A further attempt trains what the first one trained, whatever the operator's defaults have become since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.job import FineTuneJob, HowItLives, WhereItRuns
from finetune_api.load import load_job
from finetune_api.spec_size import SPEC_LIMIT_VALUES, may_have_more_values
from finetune_operator.names import JOB_FILE_KEY

YAML_LIMIT_BYTES = 8 * 1024
"""Longest record in YAML that is read, as earlier versions wrote it: a parser in Python takes milliseconds for a KiB,
and whoever may edit jobs may also put another ConfigMap in the place of the first attempt's."""

_YAML_PATIENCE = 3000
"""Tokens of such a record. Earlier versions wrote a line for each value, so no longer record of theirs has more."""

_VALUES_LIMIT = SPEC_LIMIT_VALUES + 100
"""Values of a record in JSON: those of its spec, and a few of its metadata."""

_CHANGEABLE = {*WhereItRuns.model_fields, *HowItLives.model_fields, "worker_resources"}
_OWN = {*_CHANGEABLE, "trust_remote_code"}
"""Keys that are always those of the spec. Whoever may write ConfigMaps may write that of the first attempt anew, and is
not thereby allowed to run other code than an admission policy for FineTuneJobs lets through."""


def continued(job: FineTuneJob, first_config_map: Mapping[str, Any] | None) -> FineTuneJob:
    """`job` with what is trained and where it is published taken from the first attempt's ConfigMap.

    Where that is gone or cannot be read, the spec is all there is: it is immutable, but for the operator's defaults.
    """
    data = (first_config_map or {}).get("data")
    text = data.get(JOB_FILE_KEY) if isinstance(data, Mapping) else None
    first = _read(text) if isinstance(text, str) else None
    if first is None:
        return job
    changes = {name: getattr(job.spec, name) for name in _OWN}
    spec = first.spec.model_copy(update=changes)
    # What its author did not write counts as not written, or the next comparison takes defaults for a change.
    spec.model_fields_set.difference_update(_OWN - job.spec.model_fields_set)
    return job.model_copy(update={"spec": spec})


def _read(record: str) -> FineTuneJob | None:
    """The job in `record`; None where it is none, or could be none of ours for its size.

    By its source it is told to be JSON: what is not is else tried as YAML, which is a thousand times slower.
    """
    if record.startswith("{"):
        if may_have_more_values(record, _VALUES_LIMIT):
            return None
        return load_job(record, source="job.json").job
    if len(record) > YAML_LIMIT_BYTES:
        return None
    return load_job(record, source=JOB_FILE_KEY, patience=_YAML_PATIENCE).job
