"""Objects as YAML text that reads back as the same objects, with us and with kubectl.

The effective job is stored as such a text beside each attempt and each adapter: whoever reads it trains the same job.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from finetune_api.document import parse_value
from finetune_api.job import FineTuneJob

LINE_WIDTH = 1000
"""In characters; longer texts are folded, which reads worse than a long line."""


if TYPE_CHECKING:
    _SafeDumper = yaml.SafeDumper
else:
    # libyaml's is ten times faster, and an operator writes this text for every job.
    _SafeDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):
    """SafeDumper that quotes what our reader and kubectl take for something else than text (1e-4, 0b1)."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  # PyYAML's signature
        return True


class _BlockDumper(_Dumper):
    """The same, with a text of several lines as a block."""


@functools.lru_cache(maxsize=4096)
def _reads_back(value: str) -> bool:
    """Whether YAML's own choice of quotes, or of none, is one that our reader understands."""
    # Without quotes PyYAML writes every line break twice and lets the text run over as many lines.
    return "\n" not in value and parse_value(yaml.safe_dump(value, allow_unicode=True, width=LINE_WIDTH), "") == value


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = None if _reads_back(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _block_text(dumper: _BlockDumper, value: str) -> yaml.ScalarNode:
    if "\n" not in value.rstrip("\n"):
        return _text(dumper, value)
    # PyYAML itself goes back to quotes for what a block cannot hold, such as spaces at the end of a line.
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|")


_Dumper.add_representer(str, _text)
_BlockDumper.add_representer(str, _block_text)


def job_yaml(job: FineTuneJob) -> str:
    """`job` as a manifest in YAML, without what is not set."""
    return _dump([job.model_dump(mode="json", by_alias=True, exclude_none=True)], _Dumper)


def objects_yaml(objects: Iterable[Mapping[str, Any]]) -> str:
    """Kubernetes objects as documents of one YAML file, texts of several lines as blocks."""
    return _dump(objects, _BlockDumper)


def _dump(documents: Iterable[Mapping[str, Any]], dumper: type[_Dumper]) -> str:
    objects = list(documents)
    return yaml.dump_all(
        objects,
        Dumper=dumper,
        sort_keys=False,
        allow_unicode=True,
        width=LINE_WIDTH,
        explicit_start=len(objects) > 1,
    )
