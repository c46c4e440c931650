"""Tokenized rows as memory-mapped arrays in a folder.

Files of a folder, for R rows, S sequences and T tokens:
    ids.bin       uint32 [T]    token ids, sequence after sequence
    trained.bin   uint8  [T]    1 where the model must produce the token
    sequences.npy int64  [S+1]  first token of each sequence
    trained.npy   int64  [S]    trained tokens of each sequence
    rows.npy      int64  [R+1]  first sequence of each row
    lines.npy     int64  [R]    line number in the source file
    stats.json    DataStats
"""

from __future__ import annotations

import json
from array import array
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from finetune_trainer.data.block import TokenizedBlock

Array = np.ndarray[Any, np.dtype[Any]]

DAMAGED = (OSError, ValueError, LookupError, TypeError)
"""What opening a folder raises where a file is missing, or they do not belong together."""


@dataclass
class DataStats:
    """Counts of one tokenized file. Tokens are those that are kept after truncation."""

    rows: int = 0
    """Rows in the file."""
    invalid_rows: int = 0
    """Rows that could not be read (only more than 0 when the job allows it)."""
    dropped_rows: int = 0
    """Rows left without a single trained token, after truncation."""
    truncated_rows: int = 0
    retokenized_rows: int = 0
    """Rows tokenized again because a token straddled the seam between prompt and answer."""
    kept_rows: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    longest_row: int = 0
    """Tokens of the longest row before truncation."""
    sha256: str = ""
    """Digest of the file's bytes."""
    notices: list[str] = field(default_factory=list)


class TokenizedData:
    """The rows of one cache folder; nothing but the row index is held in memory."""

    def __init__(self, folder: Path) -> None:
        """Map the files of `folder`.

        Raises:
            OSError, ValueError, LookupError, TypeError: see DAMAGED.
        """
        self.folder = folder
        self.stats = DataStats(**json.loads((folder / "stats.json").read_text()))
        self._ids: Array = np.memmap(folder / "ids.bin", dtype=np.uint32, mode="r")
        self._trained: Array = np.memmap(folder / "trained.bin", dtype=np.uint8, mode="r")
        self._sequences: Array = np.load(folder / "sequences.npy", mmap_mode="r")
        self._rows: Array = np.load(folder / "rows.npy", mmap_mode="r")
        self.lines: Array = np.load(folder / "lines.npy", mmap_mode="r")
        trained = np.load(folder / "trained.npy")
        self._check(trained)
        self.row_trained_tokens: Array = self._per_row(trained)
        """Trained tokens of each row, int64 [R]."""
        self.row_tokens: Array = self._per_row(np.diff(self._sequences))
        """Tokens of each row over all its sequences, int64 [R]."""

    def __len__(self) -> int:
        return len(self._rows) - 1

    def highest_id(self) -> int:
        """The highest token id of all rows; -1 where there is none."""
        return int(self._ids.max(initial=0)) if len(self._ids) else -1

    def sequences(self, row: int) -> list[tuple[Array, Array]]:
        """(ids int64 [L], trained bool [L]) of each sequence of a row."""
        found = []
        for sequence in range(int(self._rows[row]), int(self._rows[row + 1])):
            span = slice(int(self._sequences[sequence]), int(self._sequences[sequence + 1]))
            found.append((self._ids[span].astype(np.int64), self._trained[span].astype(bool)))
        return found

    def _check(self, trained: Array) -> None:
        """Raise ValueError where one file is shorter or longer than another, or an index does not rise."""
        sizes = (len(self._ids), len(self._trained), self.stats.tokens, int(self._sequences[-1]))
        counts = (len(self.lines), len(self), self.stats.kept_rows)
        sequences = (len(trained), len(self._sequences) - 1, int(self._rows[-1]))
        if any(len(set(same)) > 1 for same in (sizes, counts, sequences)):
            raise ValueError(f"{self.folder} is damaged")
        if any(ends[0] != 0 or (np.diff(ends) <= 0).any() for ends in (self._sequences, self._rows)):
            raise ValueError(f"{self.folder} is damaged")

    def _per_row(self, per_sequence: Array) -> Array:
        return np.add.reduceat(per_sequence, np.asarray(self._rows[:-1]), dtype=np.int64)


class Writer:
    """Writes the files of a folder block by block; eight bytes per row and sequence are kept until the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sequences, self._trained = array("q", [0]), array("q")
        self._rows, self._lines = array("q", [0]), array("q")
        self._open = ExitStack()
        self._ids = self._open.enter_context((folder / "ids.bin").open("wb"))
        self._mask = self._open.enter_context((folder / "trained.bin").open("wb"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()

    def add(self, block: TokenizedBlock) -> None:
        """Append the kept rows of a block."""
        self._ids.write(block.ids)
        self._mask.write(block.trained_mask)
        _extend_ends(self._sequences, block.lengths)
        _extend_ends(self._rows, block.sequences)
        self._trained.extend(block.trained)
        self._lines.extend(block.lines)

    def finish(self, stats: DataStats) -> None:
        """Write the index and `stats`, with what this writer counted."""
        stats.kept_rows, stats.tokens = len(self._lines), self._sequences[-1]
        stats.trainable_tokens = sum(self._trained)
        index = {"sequences": self._sequences, "trained": self._trained, "rows": self._rows, "lines": self._lines}
        for name, values in index.items():
            np.save(self._folder / f"{name}.npy", np.frombuffer(values, dtype=np.int64))
        (self._folder / "stats.json").write_text(json.dumps(asdict(stats)))


def _extend_ends(ends: array[int], sizes: array[int]) -> None:
    """Append to `ends` where further parts of `sizes` end."""
    ends.frombytes((np.cumsum(np.frombuffer(sizes, dtype=np.int64)) + ends[-1]).tobytes())
