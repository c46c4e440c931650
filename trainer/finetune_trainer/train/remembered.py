"""What was measured before the first step of the very same case: the same base, adapter, rows, device and code.

The gate of a small job takes longer than its first steps, and its answer is the same whenever all that it depends on
is. So it is asked once per case and machine. What is kept is small, and whatever cannot be read is measured again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from finetune_trainer.digest import digest_of
from finetune_trainer.model.batch import TokenPair

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "accelerate")


class Measured(BaseModel):
    """A case in which packs are exact, in the first layout that was tried."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kept_bytes_per_token: float
    sample_tokens: int
    """That the gate was allowed."""
    checkpointed: int
    """As `Choice.checkpointed`: the gate measures layers that are computed again."""
    prefixes_asked: bool
    prefixes: bool
    loss_difference: float
    gradient_difference: float


class Remembered:
    """What is known of one case.

    Args:
        folder: of this machine's cache.
        case: all that the answer depends on, besides libraries, this package and the device; as JSON has it.
        rows: those that are measured.
        devices: names of what the processes train on.
    """

    def __init__(
        self, folder: Path, case: Mapping[str, Any], rows: Sequence[list[TokenPair]], devices: Sequence[str]
    ) -> None:
        whole = {
            **case,
            "code": _code(),
            "devices": sorted(set(devices)),
            "libraries": _versions(),
            "rows": _digest(rows),
        }
        self._path = folder / f"{digest_of(whole)}.json"

    def recall(self) -> Measured | None:
        """What was measured before, if it was."""
        with suppress(OSError, ValueError):
            return Measured.model_validate_json(self._path.read_text(encoding="utf-8"))
        return None

    def keep(self, measured: Measured) -> None:
        """Keep it, where the cache can be written."""
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial")
            partial.write_text(measured.model_dump_json(), encoding="utf-8")
            partial.replace(self._path)


@functools.cache
def _code() -> str:
    """Digest of this package: packs may be computed otherwise in the next version, or after an edit."""
    found = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        found.update(path.relative_to(_PACKAGE).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def name_of(device: torch.device) -> str:
    """What rounds as another of the same name does."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _digest(rows: Sequence[list[TokenPair]]) -> str:
    found = hashlib.sha256()
    for row in rows:
        for ids, trained in row:
            found.update(len(ids).to_bytes(8, "little"))
            found.update(ids.tobytes())
            found.update(trained.tobytes())
        found.update(b"row")
    return found.hexdigest()
