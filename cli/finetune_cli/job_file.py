"""The effective job as a file that reads back as the same job."""

from __future__ import annotations

from typing import Any

import yaml

from finetune_api.document import parse_value
from finetune_api.job import FineTuneJob

LINE_WIDTH = 1000
"""In characters; longer texts are folded, which reads worse than a long line."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what only our reader would take for something else than text (1e-4, 0b1)."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    written = yaml.safe_dump(value, allow_unicode=True, width=LINE_WIDTH)
    style = None if parse_value(written, "a text") == value else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def job_yaml(job: FineTuneJob) -> str:
    """`job` as a manifest in YAML, without what is not set."""
    manifest: dict[str, Any] = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=LINE_WIDTH)
