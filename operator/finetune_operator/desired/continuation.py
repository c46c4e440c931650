"""A further attempt trains what the first one trained, whatever the operator's defaults have become since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.job import FineTuneJob, HowItLives, WhereItRuns
from finetune_api.load import load_job
from finetune_operator.names import JOB_FILE_KEY

YAML_LIMIT_BYTES = 8 * 1024
"""Longest record in YAML that is read, as earlier versions wrote it: a parser in Python takes milliseconds for a KiB,
and whoever may edit jobs may also put another ConfigMap in the place of the first attempt's."""

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
    first = load_job(text, source=JOB_FILE_KEY).job if isinstance(text, str) and _is_quick_to_read(text) else None
    if first is None:
        return job
    changes = {name: getattr(job.spec, name) for name in _OWN}
    spec = first.spec.model_copy(update=changes)
    # What its author did not write counts as not written, or the next comparison takes defaults for a change.
    spec.model_fields_set.difference_update(_OWN - job.spec.model_fields_set)
    return job.model_copy(update={"spec": spec})


def _is_quick_to_read(text: str) -> bool:
    return text.startswith("{") or len(text) <= YAML_LIMIT_BYTES
