"""A block of lines -> the arrays that are written of it.

This is all that happens to a row, in three steps: parts of it can run at the same time, in threads or in processes.
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
from finetune_trainer.data.byte_exact import byte_exact
from finetune_trainer.data.byte_level import ID_BYTES, ByteLevelTokenizer, EncodedRows
from finetune_trainer.data.conversation import RowError, RowRules
from finetune_trainer.data.read import Block, ReadReport, read_block
from finetune_trainer.data.render import Renderer
from finetune_trainer.data.tokenize import RowTokenizer, Span, TokenizedRow, Tokens, trainable


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


@dataclass
class RenderedBlock:
    """The good rows of a block as text."""

    block: Block
    report: ReadReport
    lines: list[int] = field(default_factory=list)
    """Line number of each row."""
    counts: list[int] = field(default_factory=list)
    """Renderings of each row."""
    renderings: list[Rendering] = field(default_factory=list)
    """Of all rows."""


Encoded = EncodedRows | Sequence[Tokens]
"""Ids alone or tokens with offsets of each rendering."""

_Sequences = list[tuple[bytes, tuple[Span, ...]]]
"""(ids uint32, trained stretches) of each sequence of a row or rendering."""


class BlockTokenizer:
    """Makes arrays of the blocks of one source. Each step remembers things: one thread at a time may run it."""

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self._tokenizer = source.tokenizer.fresh()
        backend = source.tokenizer.backend
        self._byte_level = ByteLevelTokenizer(backend) if byte_exact(backend) else None
        self._doubled_bos = array("I", [] if source.bos_id is None else [source.bos_id] * 2).tobytes()

    def __call__(self, block: Block, *, outcome_is_decided: bool = False) -> TokenizedBlock:
        """All three steps."""
        rendered = self.render(block, outcome_is_decided=outcome_is_decided)
        return self.finish(rendered, self.encode(rendered))

    def render(self, block: Block, *, outcome_is_decided: bool = False) -> RenderedBlock:
        """Read, check and render the rows.

        Args:
            block: where they are.
            outcome_is_decided: an earlier block has a bad row that the job does not allow, so that the rest of the
                file is only read to be counted.
        """
        source, report = self._source, ReadReport()
        rendered = RenderedBlock(block, report)
        for row in read_block(source.path, block, source.rules, report):
            try:
                renderings = source.renderer.render(row.conversation.messages)
            except (RowError, RenderError) as error:
                report.refuse(row.line, error)
                continue
            rendered.lines.append(row.line)
            rendered.counts.append(len(renderings))
            rendered.renderings += renderings
        if outcome_is_decided or (report.invalid_rows and not source.max_invalid_share):
            return RenderedBlock(block, report)
        return rendered

    def encode(self, rendered: RenderedBlock) -> Encoded:
        """The tokenizer's work, which other threads of Python do not wait for."""
        encoder = self._tokenizer if self._byte_level is None else self._byte_level
        return encoder.encode(rendered.renderings)

    def finish(self, rendered: RenderedBlock, encoded: Encoded) -> TokenizedBlock:
        """What is trained of which tokens, cut at the context length."""
        result = TokenizedBlock(rendered.block, rendered.report)
        result.brought_rows = sum(rendering.brought for rendering in rendered.renderings)
        kept: _Sequences = []
        found = iter(self._tokenized(rendered.renderings, encoded))
        for line, count in zip(rendered.lines, rendered.counts, strict=True):
            sequences, retokenized = next(found)
            for more, again in islice(found, count - 1):
                sequences, retokenized = sequences + more, retokenized or again
            result.retokenized_rows += retokenized
            fitting = self._fitting(sequences, result)
            if fitting:
                kept += fitting
                result.lines.append(line)
                result.sequences.append(len(fitting))
        _join(kept, result)
        return result

    def _tokenized(self, renderings: Sequence[Rendering], encoded: Encoded) -> list[tuple[_Sequences, bool]]:
        """The sequences of each rendering, and whether it was tokenized again."""
        if not isinstance(encoded, EncodedRows):
            rows = self._tokenizer.finish(encoded, renderings, train_all=self._source.train_all)
            return [_compact(row) for row in rows]
        if self._source.train_all:
            return [([(ids, trainable([(0, len(ids) // ID_BYTES)]))], False) for ids in encoded.ids]
        found = encoded.spans(renderings)
        others = [rendering for rendering, spans in zip(renderings, found, strict=True) if spans is None]
        again = iter(self._tokenizer.tokenize(others))
        return [
            _compact(next(again)) if spans is None else ([(ids, spans)], False)
            for ids, spans in zip(encoded.ids, found, strict=True)
        ]

    def _fitting(self, sequences: _Sequences, result: TokenizedBlock) -> _Sequences:
        """The sequences that still train something after truncation; the row is counted in `result`."""
        limit = self._source.context_length
        longest = max([len(ids) for ids, _ in sequences], default=0) // ID_BYTES
        result.longest_row = max(result.longest_row, longest)
        if self._doubled_bos and sequences:
            result.doubled_bos_rows += sequences[0][0].startswith(self._doubled_bos)
        if limit is not None and longest > limit:
            result.truncated_rows += 1
            sequences = [_cut(ids, spans, limit) for ids, spans in sequences]
        kept = [(ids, spans) for ids, spans in sequences if spans]
        result.dropped_rows += not kept
        return kept


def _compact(row: TokenizedRow) -> tuple[_Sequences, bool]:
    found = [(array("I", sequence.ids).tobytes(), sequence.spans) for sequence in row.sequences]
    return found, row.retokenized


def _cut(ids: bytes, spans: tuple[Span, ...], limit: int) -> tuple[bytes, tuple[Span, ...]]:
    return ids[: limit * ID_BYTES], tuple((first, min(end, limit)) for first, end in spans if first < limit)


def _join(kept: _Sequences, result: TokenizedBlock) -> None:
    result.ids = b"".join([ids for ids, _ in kept])
    mask = np.zeros(len(result.ids) // ID_BYTES, dtype=np.uint8)
    begin = 0
    for ids, spans in kept:
        trained = 0
        for first, end in spans:
            mask[begin + first : begin + end] = 1
            trained += end - first
        length = len(ids) // ID_BYTES
        begin += length
        result.lengths.append(length)
        result.trained.append(trained)
    result.trained_mask = mask.tobytes()
