"""A data file -> tokenized rows in a cache folder.

A folder is written beside its final name and renamed, so it is complete or absent; one that was damaged later is made
again. Its name is a digest of everything that decides its content, the code that makes it included.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from finetune_api.outcome import Reason
from finetune_api.problem import MOST
from finetune_trainer.data.block import BlockTokenizer, DataSource, TokenizedBlock
from finetune_trainer.data.read import MOST_KEYS, Block, ReadReport, blocks, check_report, count_lines, file_sha256
from finetune_trainer.data.scratch import release, scratch_folder, sweep
from finetune_trainer.data.shapes import MESSAGES
from finetune_trainer.data.tokenized_data import DAMAGED, DataStats, TokenizedData, Writer
from finetune_trainer.data.workers import Workers, no_answer, patience_seconds, worker_count
from finetune_trainer.errors import JobError

__all__ = ["DataSource", "DataStats", "OnProgress", "TokenizedData", "prepare"]

_BLOCK_BYTES = 1 << 18
"""Lines read, rendered and tokenized together: enough for all cores, little enough to show progress. A tokenizer keeps
some hundred bytes per token until the block is written."""

_FEWEST_WORKERS = 3
"""Processes below which threads of this one, which start at once, are as fast."""

_THREADS = 3
"""One for Python's lock and two that wait for the tokenizer, which has threads of its own."""

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
    if (found := _whole(folder)) is not None:
        return found
    cache.mkdir(parents=True, exist_ok=True)
    sweep(cache)
    with scratch_folder(cache) as scratch:
        _write(source, checksum, scratch, on_progress)
        release(scratch)
        # Another process may have been faster; its result is the same.
        _rename_unless_there(scratch, folder)
    return TokenizedData(folder)


def _whole(folder: Path) -> TokenizedData | None:
    """The data in `folder`; None when there are none, or none that are whole, which are then removed."""
    if not folder.exists():
        return None
    try:
        return TokenizedData(folder)
    except DAMAGED:
        shutil.rmtree(folder, ignore_errors=True)
        return None


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
        "shares": [source.max_invalid_share, source.max_dropped_share, source.max_truncated_share],
        "code": _code_version(),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _code_version() -> str:
    """Digest of the code between a row and its tokens."""
    from finetune_api import answer_literals, prompt_format

    contract = [Path(answer_literals.__file__), Path(prompt_format.__file__)]
    files = [*sorted(Path(__file__).parent.glob("*.py")), *contract]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _write(source: DataSource, checksum: str, folder: Path, on_progress: OnProgress | None) -> None:
    stats, report, doubled, brought = DataStats(sha256=checksum), ReadReport(), 0, 0
    total = count_lines(source.path) if on_progress is not None else 0
    with Writer(folder) as writer, closing(_tokenized_blocks(source, report)) as tokenized:
        for part in tokenized:
            report.add(part.report)
            stats.dropped_rows += part.dropped_rows
            stats.truncated_rows += part.truncated_rows
            stats.retokenized_rows += part.retokenized_rows
            stats.longest_row = max(stats.longest_row, part.longest_row)
            doubled += part.doubled_bos_rows
            brought += part.brought_rows
            writer.add(part)
            if on_progress is not None:
                done = part.block.first_line + part.block.line_count - 1
                on_progress(done, max(total, done))
        check_report(source.name, report, source.max_invalid_share)
        stats.rows, stats.invalid_rows = report.rows, report.invalid_rows
        stats.notices = _notices(source.name, report)
        if doubled:
            stats.notices.append(
                f"{source.name}: {doubled} rows begin with two BOS tokens, one of prompt_format.bos and one of their "
                "own: remove one of the two."
            )
        if brought:
            stats.notices.append(
                f"{source.name}: answers of {brought} rows begin or end with text that prompt_format.assistant writes "
                "around them: it is written once."
            )
        _check_cut(source, stats)
        writer.finish(stats)


def _tokenized_blocks(source: DataSource, report: ReadReport) -> Generator[TokenizedBlock]:
    """All blocks in order; `report` is what the caller has found in them so far."""
    parts = blocks(source.path, _BLOCK_BYTES)
    count = worker_count(source.path.stat().st_size) if source.renderer.portable else 0
    if count < _FEWEST_WORKERS:
        yield from _tokenized_here(source, parts, report)
    else:
        with Workers(source, count) as workers:
            yield from workers.tokenized(parts, report)


def _tokenized_here(source: DataSource, parts: Iterator[Block], report: ReadReport) -> Generator[TokenizedBlock]:
    """By threads of this process: while one does Python's part of a block, the tokenizer works for the others."""
    free = [BlockTokenizer(source) for _ in range(_THREADS)]
    waiting: deque[tuple[BlockTokenizer, Block, Future[TokenizedBlock]]] = deque()
    threads = ThreadPoolExecutor(_THREADS)
    try:
        for part in parts:
            decided = bool(report.invalid_rows) and not source.max_invalid_share
            tokenizer = free.pop()
            waiting.append((tokenizer, part, threads.submit(tokenizer, part, outcome_is_decided=decided)))
            if not free:
                tokenizer, first, future = waiting.popleft()
                yield _result(future, source.name, first)
                free.append(tokenizer)
        while waiting:
            _, part, future = waiting.popleft()
            yield _result(future, source.name, part)
    except JobError:
        # One that does not end is not waited for: nothing can stop a thread.
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        threads.shutdown(cancel_futures=True)
        raise
    threads.shutdown()


def _result(future: Future[TokenizedBlock], name: str, block: Block) -> TokenizedBlock:
    try:
        return future.result(patience_seconds(block))
    except TimeoutError as error:
        raise no_answer(name, block) from error


def _check_cut(source: DataSource, stats: DataStats) -> None:
    """Refuse data of which context_length leaves too little, and tell what it costs where that is allowed."""
    usable = stats.rows - stats.invalid_rows
    if stats.dropped_rows == usable or stats.dropped_rows > source.max_dropped_share * usable:
        longest = f"the longest row has {stats.longest_row} tokens"
        limit = f" and context_length is {source.context_length}" if source.context_length else ""
        raise JobError(
            Reason.DATA_INVALID,
            f"{source.name}: {stats.dropped_rows} of {usable} rows have nothing left to train on ({longest}{limit}; "
            f"allowed share {source.max_dropped_share:.2%}): raise context_length, shorten the prompts or raise "
            "max_dropped_row_share.",
        )
    cut = (
        f"{stats.truncated_rows} of {usable} rows are longer than the {source.context_length} tokens of context_length"
    )
    if stats.truncated_rows > source.max_truncated_share * usable:
        raise JobError(
            Reason.DATA_INVALID,
            f"{source.name}: {cut} and would lose their end (allowed share {source.max_truncated_share:.2%}; the "
            f"longest has {stats.longest_row}): raise context_length, shorten them or raise max_truncated_row_share.",
        )
    if stats.truncated_rows:
        lost = f"; {stats.dropped_rows} have nothing left to train on and are dropped" if stats.dropped_rows else ""
        stats.notices.append(f"{source.name}: {cut} and lose their end{lost}.")


def _notices(name: str, report: ReadReport) -> list[str]:
    found = [f"{name}: rows are read as {shape}." for shape in report.shapes if shape != MESSAGES]
    keys = sorted(report.unused_keys.items())
    found += [
        f"{name}: {rows} rows have the key {key!r}, which has no effect on training." for key, rows in keys[:MOST]
    ]
    if more := keys[MOST:]:
        least = "at least " if len(keys) == MOST_KEYS else ""
        found.append(f"{name}: {least}{len(more)} more keys of rows have no effect on training.")
    if report.invalid_rows:
        found.append(f"{name}: {report.invalid_rows} invalid rows were left out: {'; '.join(report.shown)}.")
    return found
