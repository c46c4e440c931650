"""Objects as text that reads back as the same objects, with us and with kubectl.

The effective job is stored as such a text beside each attempt and each adapter: whoever reads it trains the same job.
People get YAML. What a cluster keeps is JSON, which is YAML too, and is read a thousand times faster.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from finetune_api.document import is_other_than_text
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


_ODD = re.compile(r"[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd]")
"""What needs escapes, or readers of YAML disagree about: line breaks of every kind, controls, and the like."""


_ODD_IN_JSON = re.compile(r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""What JSON allows within a text, and readers of YAML refuse or take for a line break."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # YAML's own choice of quotes, or of none, goes by YAML 1.1's idea of what is a number.
    style = '"' if _ODD.search(value) or is_other_than_text(value) else None
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


def job_json(job: FineTuneJob) -> str:
    """`job` as a manifest in JSON, without what is not set, a line for each value. As YAML it says the same."""
    text = job.model_dump_json(by_alias=True, exclude_none=True, indent=2)
    return _ODD_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


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
