"""metrics.jsonl: every figure of a run, one JSON object per line, for people, plots and the report.

The file survives the attempt that wrote it. After a resume it reads as if nothing had happened: what the lost attempt
wrote beyond the checkpoint is dropped, since those steps are trained again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import orjson


def utc_now() -> datetime:
    """The wall clock, in UTC."""
    return datetime.now(UTC)


def measured(value: object) -> float | None:
    """`value` as a finite number, or None when it is missing, NaN, infinite or no number: never a made-up zero."""
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]  # tensors and numpy scalars convert, the rest raises
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file in order. A line torn by a kill is left out; a file that is absent has no lines."""
    try:
        lines = path.open("rb")
    except FileNotFoundError:
        return
    with lines:
        for line in lines:
            try:
                entry = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry


class MetricsLog:
    """Appends to one metrics file.

    Args:
        path: the file; its folder is created.
        resumed_at_step: the optimizer step of the checkpoint that this attempt continues from. Lines of later steps
            are dropped. None starts an empty file.
        now: wall clock, for the field `time`.
    """

    def __init__(self, path: Path, *, resumed_at_step: int | None, now: Callable[[], datetime] = utc_now) -> None:
        self.path = path
        self._now = now
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_steps(path, -1 if resumed_at_step is None else resumed_at_step)
        self._file: BinaryIO = path.open("ab")

    def append(self, step: int, *, epoch: float | None, values: Mapping[str, object]) -> None:
        """Write one line: step, epoch, time (RFC 3339, UTC) and `values`; a number that is not finite becomes null."""
        entry: dict[str, object] = {"step": step, "epoch": measured(epoch), "time": self._now().isoformat()}
        entry.update(
            (name, value if isinstance(value, int | StrEnum) else measured(value)) for name, value in values.items()
        )
        self._file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()

    def close(self) -> None:
        """Flush to disk and close; the log cannot be used afterwards."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keep_steps(path: Path, last_step: int) -> None:
    """Leave only the whole lines of steps up to `last_step`; a kill at any moment leaves the old file or the new."""
    rewritten = path.with_name(f".{path.name}.tmp")
    with rewritten.open("wb") as file:
        for entry in read_metrics(path):
            if entry["step"] <= last_step:
                file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        file.flush()
        os.fsync(file.fileno())
    rewritten.replace(path)
