"""Results of earlier runs, as long as neither the libraries nor the code they came from has changed."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from examples.safety.base_model import cache_dir
from tests.architectures.cases import Case
from tests.architectures.record import Record

LIBRARIES = ("transformers", "peft", "torch", "accelerate")
"""What docs/models.md holds for."""

_ROOT = Path(__file__).parents[2]
_EXAMINED = ("trainer/finetune_trainer", "crds/finetune_api")
_EXAMINING = ("cases", "examine", "families", "pool", "record", "sizes", "tokenizer", "zoo")


def versions() -> str:
    """What the results hold for: `transformers 5.23.0, …`."""
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def results_folder(quantization: str | None = None) -> Path:
    """Where results of this very code with these libraries are kept.

    Args:
        quantization: of the base models, if any.
    """
    digest = hashlib.sha256(versions().encode() + (quantization or "").encode())
    own = [Path(__file__).with_name(f"{name}.py") for name in _EXAMINING]
    for path in [*own, *(path for part in _EXAMINED for path in sorted((_ROOT / part).rglob("*.py")))]:
        digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return cache_dir() / "models-examined" / digest.hexdigest()[:16]


class Results:
    """Records by the names of cases, kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def found(self, cases: list[Case]) -> dict[str, Record]:
        """Those of `cases` that are known."""
        paths = {case.name: self._path(case.name) for case in cases}
        return {name: Record.read(path) for name, path in paths.items() if path.is_file()}

    def keep(self, record: Record) -> None:
        """Remember it."""
        record.write(self._path(record.name))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
