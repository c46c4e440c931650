"""The FineTuneJobs that readers copy, as they stand in their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


class ExampleJob(NamedTuple):
    """One document of a file."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """Of its file."""
        return str(self.path.relative_to(ROOT).with_suffix(""))


def _jobs() -> Iterator[ExampleJob]:
    for path in sorted([*EXAMPLES.rglob("*.yaml"), ROOT / "integrations" / "kueue" / "job.yaml"]):
        for text in path.read_text().split("\n---\n"):
            if (yaml.safe_load(text) or {}).get("kind") == "FineTuneJob":
                yield ExampleJob(path, text)


JOBS = list(_jobs())

ON_A_LAPTOP = ("examples/safety/finetune",)
"""Jobs whose paths are those of a clone of the repository."""

IN_A_CLUSTER = [job for job in JOBS if job.name not in ON_A_LAPTOP]
