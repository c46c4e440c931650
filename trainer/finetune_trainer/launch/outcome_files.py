"""The folder through which workers tell the launcher how they ended: two small files per rank.

`rank-N.started` exists once the worker runs, so that a rank which vanished without a word is still known;
`rank-N.json` is its TerminationMessage. They appear whole or not at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune_api.outcome import TerminationMessage

_FILE_NAME = re.compile(r"rank-(\d+)\.(started|json)")


@dataclass(frozen=True)
class RankRecord:
    """What one rank left: that it started, and perhaps its last words."""

    outcome: TerminationMessage | None
    written_at: float | None
    """Seconds since the epoch at which the last words were written."""


def mark_started(folder: Path, rank: int) -> None:
    """Leave the trace that the worker of `rank` runs."""
    (folder / f"rank-{rank}.started").touch()


def any_started(folder: Path) -> bool:
    """Whether a worker has started yet."""
    return any(folder.glob("rank-*.started"))


def write_outcome(folder: Path, rank: int, message: TerminationMessage) -> None:
    """Write the last words of `rank`; a file that is there already stays, because the first words are the cause."""
    final = folder / f"rank-{rank}.json"
    if final.exists():
        return
    partial = folder / f"rank-{rank}.partial"
    partial.write_bytes(message.to_bytes())
    partial.replace(final)


def read_all(folder: Path) -> dict[int, RankRecord]:
    """Every rank that started on this node, with its last words where they are whole."""
    records: dict[int, RankRecord] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            continue
        rank = int(match[1])
        if match[2] == "started":
            records.setdefault(rank, RankRecord(outcome=None, written_at=None))
            continue
        outcome = TerminationMessage.parse(path.read_bytes())
        records[rank] = RankRecord(outcome=outcome, written_at=path.stat().st_mtime if outcome else None)
    return records
