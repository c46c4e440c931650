"""Tokenized rows as memory-mapped arrays in a cache folder.

A folder is written beside its final name and renamed, so it is complete or absent; its name is a digest of everything
that decides its content, the code that makes it included, so a stale one is never used.

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

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from finetune_api.outcome import Reason
from finetune_api.prompt_format import RenderError, Rendering
from finetune_trainer.data.conversation import RowError, RowRules
from finetune_trainer.data.read import ReadReport, Row, check_report, count_lines, file_sha256, read_rows
from finetune_trainer.data.render import Renderer
from finetune_trainer.data.tokenize import RowTokenizer, TokenizedRow, TokenizedSequence, Tokens
from finetune_trainer.errors import JobError

_BATCH_ROWS = 512
"""Rows rendered and tokenized together: enough for all cores, little enough to show progress."""

_BATCH_CHARACTERS = 2_000_000
"""Text after which a batch ends earlier: a tokenizer keeps some hundred bytes per token until the batch is written."""

Array = np.ndarray[Any, np.dtype[Any]]

Item = TypeVar("Item")

_Batch = list[tuple[Row, list[Rendering]]]
"""Rows with their renderings."""


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


class TokenizedData:
    """The rows of one cache folder; nothing but the row index is held in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stats = DataStats(**json.loads((folder / "stats.json").read_text()))
        self._ids: Array = np.memmap(folder / "ids.bin", dtype=np.uint32, mode="r")
        self._trained: Array = np.memmap(folder / "trained.bin", dtype=np.uint8, mode="r")
        self._sequences: Array = np.load(folder / "sequences.npy", mmap_mode="r")
        self._rows: Array = np.load(folder / "rows.npy", mmap_mode="r")
        self.lines: Array = np.load(folder / "lines.npy", mmap_mode="r")
        self.row_trained_tokens: Array = self._per_row(np.load(folder / "trained.npy"))
        """Trained tokens of each row, int64 [R]."""
        self.row_tokens: Array = self._per_row(np.diff(self._sequences))
        """Tokens of each row over all its sequences, int64 [R]."""

    def __len__(self) -> int:
        return len(self._rows) - 1

    def sequences(self, row: int) -> list[tuple[Array, Array]]:
        """(ids int64 [L], trained bool [L]) of each sequence of a row."""
        found = []
        for sequence in range(int(self._rows[row]), int(self._rows[row + 1])):
            span = slice(int(self._sequences[sequence]), int(self._sequences[sequence + 1]))
            found.append((self._ids[span].astype(np.int64), self._trained[span].astype(bool)))
        return found

    def _per_row(self, per_sequence: Array) -> Array:
        return np.add.reduceat(per_sequence, np.asarray(self._rows[:-1]), dtype=np.int64)


OnProgress = Callable[[int, int], None]
"""Called with the rows read so far and the rows of the file."""


def prepare(source: DataSource, cache: Path, on_progress: OnProgress | None = None) -> TokenizedData:
    """The tokenized rows of `source`, from the cache when they are there.

    Args:
        source: what to tokenize and how.
        cache: folder that holds the cache folders.
        on_progress: called after each batch of rows.

    Raises:
        JobError: DataInvalid, the rows are not fit to be trained on.
    """
    checksum = file_sha256(source.path)
    folder = cache / _key(source, checksum)
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".tokenizing-", dir=cache))
        try:
            _write(source, checksum, scratch, on_progress)
            # Another process may have been faster; its result is the same.
            _rename_unless_there(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return TokenizedData(folder)


def _rename_unless_there(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _key(source: DataSource, checksum: str) -> str:
    settings = {
        **source.settings,
        "data": checksum,
        "rules": asdict(source.rules),
        "context_length": source.context_length,
        "train_all": source.train_all,
        "shares": [source.max_invalid_share, source.max_dropped_share],
        "code": _code_version(),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _code_version() -> str:
    """Digest of the code between a row and its tokens."""
    import finetune_api.prompt_format as prompt_format

    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(prompt_format.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class _Writer:
    """Writes the files of a folder row by row; eight bytes per row and sequence are kept until the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sequences, self._trained = array("q", [0]), array("q")
        self.rows, self.lines = array("q", [0]), array("q")

    def add(self, batch: Sequence[tuple[int, Sequence[TokenizedSequence]]]) -> None:
        """Append rows: (line, sequences) each. A batch is written at once, since small arrays cost more to make."""
        sequences = [sequence for _, kept in batch for sequence in kept]
        first = self._sequences[-1]
        for line, kept in batch:
            self.lines.append(line)
            self.rows.append(self.rows[-1] + len(kept))
        for sequence in sequences:
            self._sequences.append(self._sequences[-1] + len(sequence.ids))
            self._trained.append(sum(end - start for start, end in sequence.spans))
        ids = list(chain.from_iterable(sequence.ids for sequence in sequences))
        mask = np.zeros(len(ids), dtype=np.uint8)
        for sequence, offset in zip(sequences, self._sequences[-1 - len(sequences) : -1], strict=True):
            for start, end in sequence.spans:
                mask[offset - first + start : offset - first + end] = 1
        for name, values in (("ids.bin", np.array(ids, dtype=np.uint32)), ("trained.bin", mask)):
            with (self._folder / name).open("ab") as file:
                values.tofile(file)

    def finish(self, stats: DataStats) -> None:
        """Write the index and `stats`, with what this writer counted."""
        stats.kept_rows, stats.tokens, stats.trainable_tokens = len(self.lines), self._sequences[-1], sum(self._trained)
        index = {"sequences": self._sequences, "trained": self._trained, "rows": self.rows, "lines": self.lines}
        for name, values in index.items():
            np.save(self._folder / f"{name}.npy", np.frombuffer(values, dtype=np.int64))
        (self._folder / "stats.json").write_text(json.dumps(asdict(stats)))


def _write(source: DataSource, checksum: str, folder: Path, on_progress: OnProgress | None) -> None:
    stats = DataStats(sha256=checksum)
    report = ReadReport()
    writer = _Writer(folder)
    doubled = 0
    for batch in _tokenized_batches(source, report, on_progress):
        kept = [(row.line, _kept_sequences(tokenized, source.context_length, stats)) for row, tokenized in batch]
        writer.add([(line, sequences) for line, sequences in kept if sequences])
        doubled += sum(_begins_with_two(source.bos_id, tokenized) for _, tokenized in batch)
    check_report(source.name, report, source.max_invalid_share)
    stats.rows, stats.invalid_rows = report.rows, report.invalid_rows
    stats.notices = _notices(source.name, report)
    if doubled:
        stats.notices.append(
            f"{source.name}: {doubled} rows begin with two BOS tokens, one of prompt_format.bos and one of their own: "
            "remove one of the two."
        )
    _check_dropped(source, stats)
    writer.finish(stats)


def _begins_with_two(bos_id: int | None, row: TokenizedRow) -> bool:
    return bos_id is not None and bool(row.sequences) and row.sequences[0].ids[:2] == [bos_id, bos_id]


def _tokenized_batches(
    source: DataSource, report: ReadReport, on_progress: OnProgress | None
) -> Iterator[list[tuple[Row, TokenizedRow]]]:
    """Good rows with their tokens, while threads render the batch after the next and encode the next."""
    total = count_lines(source.path) if on_progress is not None else 0
    for batch, flat, encoded in _ahead(_encoded_batches(source, _ahead(_rendered_batches(source, report)))):
        tokenized = iter(source.tokenizer.finish(encoded, flat, train_all=source.train_all))
        yield [(row, merge(list(islice(tokenized, len(renderings))))) for row, renderings in batch]
        if on_progress is not None:
            on_progress(batch[-1][0].line, max(total, batch[-1][0].line))


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made by a thread while the one before is used."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def _encoded_batches(
    source: DataSource, batches: Iterable[_Batch]
) -> Iterator[tuple[_Batch, list[Rendering], Sequence[Tokens]]]:
    for batch in batches:
        flat = [rendering for _, renderings in batch for rendering in renderings]
        yield batch, flat, source.tokenizer.encode(flat)


def _rendered_batches(source: DataSource, report: ReadReport) -> Iterator[_Batch]:
    batch: _Batch = []
    characters = 0
    for row in _rendered_rows(source, read_rows(source.path, source.rules, report), report):
        batch.append(row)
        characters += sum(len(rendering.text) for rendering in row[1])
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _rendered_rows(
    source: DataSource, rows: Iterable[Row], report: ReadReport
) -> Iterator[tuple[Row, list[Rendering]]]:
    for row in rows:
        try:
            renderings = source.renderer.render(row.conversation.messages)
        except (RowError, RenderError) as error:
            report.refuse(row.line, error)
            continue
        # Once a bad row has decided the outcome the rest is only read to be counted.
        if report.invalid_rows == 0 or source.max_invalid_share > 0:
            yield row, renderings


def merge(parts: list[TokenizedRow]) -> TokenizedRow:
    """One row of the sequences of several renderings."""
    if len(parts) == 1:
        return parts[0]
    sequences = tuple(sequence for part in parts for sequence in part.sequences)
    return TokenizedRow(sequences, any(part.retokenized for part in parts))


def _kept_sequences(row: TokenizedRow, context_length: int | None, stats: DataStats) -> list[TokenizedSequence]:
    """The sequences that still train something after truncation; the row is counted in `stats`."""
    longest = max(len(sequence.ids) for sequence in row.sequences) if row.sequences else 0
    stats.longest_row = max(stats.longest_row, longest)
    stats.retokenized_rows += row.retokenized
    sequences: Iterable[TokenizedSequence] = row.sequences
    if context_length is not None and longest > context_length:
        stats.truncated_rows += 1
        sequences = (sequence.truncated(context_length) for sequence in row.sequences)
    kept = [sequence for sequence in sequences if sequence.spans]
    stats.dropped_rows += not kept
    return kept


def _check_dropped(source: DataSource, stats: DataStats) -> None:
    usable = stats.rows - stats.invalid_rows
    share = stats.dropped_rows / usable if usable else 0.0
    if stats.dropped_rows == usable or share > source.max_dropped_share:
        longest = f"the longest row has {stats.longest_row} tokens"
        limit = f" and context_length is {source.context_length}" if source.context_length else ""
        raise JobError(
            Reason.DATA_INVALID,
            f"{source.name}: {stats.dropped_rows} of {usable} rows have nothing left to train on ({longest}{limit}; "
            f"allowed share {source.max_dropped_share:.2%}): raise context_length, shorten the prompts or raise "
            "max_dropped_row_share.",
        )


def _notices(name: str, report: ReadReport) -> list[str]:
    found = [
        f"{name}: {rows} rows have the key {key!r}, which has no effect on training."
        for key, rows in sorted(report.unused_keys.items())
    ]
    if report.invalid_rows:
        found.append(f"{name}: {report.invalid_rows} invalid rows were left out: {'; '.join(report.shown)}.")
    return found
