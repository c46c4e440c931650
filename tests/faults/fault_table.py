"""What was done to an operator and what became of it, printed at the end of a test run that asks for every fault."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

ALL_FAULTS = os.environ.get("FAULTS") == "all"
"""Whether the lengthy faults are wanted as well, and the whole of what is otherwise sampled."""


@dataclass(frozen=True)
class Row:
    """One fault, and what was compared."""

    case: str
    injected: str
    jobs: int
    """So many lived with it."""
    same_history: bool
    same_end: bool
    seconds: float


@dataclass
class FaultTable:
    """All of them."""

    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """One more."""
        self.rows.append(row)

    def lines(self) -> list[str]:
        """The table, one line a row."""
        cells = [["case", "injected", "jobs", "history", "end", "seconds"]]
        for row in self.rows:
            same = ["equal" if equal else "DIFFERENT" for equal in (row.same_history, row.same_end)]
            cells.append([row.case, row.injected, str(row.jobs), *same, f"{row.seconds:.0f}"])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
