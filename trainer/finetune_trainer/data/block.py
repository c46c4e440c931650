"""A block of lines -> the arrays that are written of it.

This is all that happens to a row; several blocks can be worked on at the same time, in threads or in processes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.prompt_format import RenderError, Rendering
from finetune_trainer.data.conversation import RowError, RowRules
from finetune_trainer.data.read import Block, ReadReport, read_block
from finetune_trainer.data.render import Renderer, renderings_of
from finetune_trainer.data.tokenize import RowTokenizer, TokenizedSequence, merge, packed


@dataclass(frozen=True)
class DataSource:
    """A data file with all that decides how it becomes tokens."""

    path: Path
    name: str
    """The address the user wrote, for messages."""
    rules: RowRules
    renderer: Renderer
    tokenizer: RowTokenizer
    settings: dict[str, Any]
    """Everything else that decides the result: tokenizer and format fingerprints, task."""
    context_length: int | None
    """Tokens after which a row is cut, or None."""
    train_all: bool
    max_invalid_share: float
    max_dropped_share: float
    max_truncated_share: float = 1.0
    bos_id: int | None = None
    """The tokenizer's BOS, to notice rows that begin with two."""


@dataclass
class TokenizedBlock:
    """What is written of a block's rows, for R kept rows, S sequences and T tokens, and what was found."""

    block: Block
    report: ReadReport
    ids: bytes = b""
    """uint32 [T]"""
    trained_mask: bytes = b""
    """uint8 [T], 1 where the model must produce the token"""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """Tokens of each sequence [S]."""
    trained: array[int] = field(default_factory=lambda: array("q"))
    """Trained tokens of each sequence [S]."""
    sequences: array[int] = field(default_factory=lambda: array("q"))
    """Sequences of each row [R]."""
    lines: array[int] = field(default_factory=lambda: array("q"))
    """Line number of each row [R]."""
    dropped_rows: int = 0
    truncated_rows: int = 0
    retokenized_rows: int = 0
    longest_row: int = 0
    """Tokens before truncation."""
    doubled_bos_rows: int = 0
    """Rows that begin with two BOS tokens."""
    brought_rows: int = 0
    """Rows whose answers bring text along that the format writes around them."""


class BlockTokenizer:
    """Makes arrays of the blocks of one source. It remembers things: one thread at a time may use it."""

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self._tokenizer = source.tokenizer.fresh()
        self._doubled_bos = packed([] if source.bos_id is None else [source.bos_id] * 2)

    def __call__(self, block: Block, *, outcome_is_decided: bool = False) -> TokenizedBlock:
        """Read, check, render and tokenize the rows, and cut them at the context length.

        Args:
            block: where they are.
            outcome_is_decided: an earlier block has a bad row that the job does not allow, so that the rest of the
                file is only read to be counted.
        """
        source, report = self._source, ReadReport()
        result = TokenizedBlock(block, report)
        rows: list[tuple[int, list[Rendering]]] = []
        for row in read_block(source.path, block, source.rules, report):
            try:
                rows.append((row.line, renderings_of(source.renderer, row.conversation)))
            except (RowError, RenderError) as error:
                report.refuse(row.line, error)
        if outcome_is_decided or (report.invalid_rows and not source.max_invalid_share):
            return result
        renderings = [rendering for _, parts in rows for rendering in parts]
        result.brought_rows = sum(rendering.brought for rendering in renderings)
        tokenized = iter(self._tokenizer.tokenize(renderings, train_all=source.train_all))
        kept: list[TokenizedSequence] = []
        for line, parts in rows:
            found = merge(list(islice(tokenized, len(parts))))
            result.retokenized_rows += found.retokenized
            fitting = self._fitting(found.sequences, result)
            if fitting:
                kept += fitting
                result.lines.append(line)
                result.sequences.append(len(fitting))
        _join(kept, result)
        return result

    def _fitting(self, sequences: tuple[TokenizedSequence, ...], result: TokenizedBlock) -> list[TokenizedSequence]:
        """The sequences that still train something after truncation; the row is counted in `result`."""
        limit = self._source.context_length
        longest = max(map(len, sequences), default=0)
        result.longest_row = max(result.longest_row, longest)
        if self._doubled_bos and sequences:
            result.doubled_bos_rows += sequences[0].packed.startswith(self._doubled_bos)
        if limit is not None and longest > limit:
            result.truncated_rows += 1
            sequences = tuple(sequence.truncated(limit) for sequence in sequences)
        kept = [sequence for sequence in sequences if sequence.spans]
        result.dropped_rows += not kept
        return kept


def _join(kept: Sequence[TokenizedSequence], result: TokenizedBlock) -> None:
    result.ids = b"".join([sequence.packed for sequence in kept])
    result.lengths.extend(map(len, kept))
    mask = np.zeros(sum(result.lengths), dtype=np.uint8)
    begin = 0
    for sequence in kept:
        for first, end in sequence.spans:
            mask[begin + first : begin + end] = 1
        result.trained.append(sum(end - first for first, end in sequence.spans))
        begin += len(sequence)
    result.trained_mask = mask.tobytes()
