"""Processes that tokenize blocks side by side: Python's part of a row holds a lock that threads would wait for.

They are started anew and never forked, since the parent has threads, and import neither torch nor transformers. They
live no longer than the connections to them.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Self

from finetune_api.outcome import Reason
from finetune_trainer.data.block import DataSource, TokenizedBlock
from finetune_trainer.data.read import Block, ReadReport
from finetune_trainer.errors import JobError
from finetune_trainer.launch.cores import threads_here
from finetune_trainer.launch.memory_events import oom_kills

_MOST_WORKERS = 16
"""Each holds a tokenizer, a hundred megabytes or two with its libraries."""

_BYTES_PER_WORKER = 8 << 20
"""Data below which starting another process takes longer than it saves."""

_BLOCKS_PER_WORKER = 2
"""Blocks sent to a worker that it has not answered: the next is there when one is done."""

_BLOCKS_IN_FLIGHT_PER_WORKER = 4
"""The same with those that are answered and wait for an earlier one to be written."""

_PATIENCE_SECONDS, _LEAST_BYTES_PER_SECOND = 900.0, 1000
"""How long a block may take: it takes a second or two, and a row may be as long as the file."""

_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""A worker is one thread: its siblings have the other cores."""


def worker_count(data_bytes: int) -> int:
    """Processes that pay for a file of `data_bytes` on the cores that this process may use; below 2, none does."""
    return min(threads_here(), _MOST_WORKERS, data_bytes // _BYTES_PER_WORKER)


def patience_seconds(block: Block) -> float:
    """How long to wait for what becomes of `block`."""
    return _PATIENCE_SECONDS + block.size / _LEAST_BYTES_PER_SECOND


def no_answer(name: str, block: Block) -> JobError:
    """InternalError: `block` of the data file `name` was waited for in vain."""
    last = block.first_line + block.line_count - 1
    return JobError(
        Reason.INTERNAL_ERROR,
        f"{name}: the rows in lines {block.first_line} to {last} were not tokenized within "
        f"{patience_seconds(block) / 60:.0f} minutes: see whether they are far longer than others, or the chat "
        "template does not come to an end for them; otherwise another attempt may succeed.",
    )


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    waiting: deque[tuple[int, Block]] = field(default_factory=deque)
    """Blocks with their numbers that it was sent and has not answered."""


class Workers:
    """`count` processes for one source. As a context manager: after the block none of them is left.

    Args:
        source: what to tokenize and how; its renderer must be `portable`.
        count: processes.
    """

    def __init__(self, source: DataSource, count: int) -> None:
        self._source = source
        self._count = count
        self._workers: list[_Worker] = []
        self._kills_before = oom_kills()

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                self._workers.append(_started())
            source = pickle.dumps(self._source)
            for worker in self._workers:
                self._send(worker, source)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()

    def tokenized(self, blocks: Iterable[Block], report: ReadReport) -> Iterator[TokenizedBlock]:
        """What each block became, in order.

        Args:
            blocks: of the source's file.
            report: of the blocks that were taken from here so far, filled by the caller; a bad row in it that the job
                does not allow lets the rest only be counted.

        Raises:
            JobError: OutOfMemory or InternalError, a process died or does not answer.
            Exception: whatever a block raised.
        """
        numbered = enumerate(blocks)
        done: dict[int, TokenizedBlock] = {}
        sent = written = 0
        while True:
            while sent - written < self._count * _BLOCKS_IN_FLIGHT_PER_WORKER:
                worker = min(self._workers, key=lambda worker: len(worker.waiting))
                if len(worker.waiting) >= _BLOCKS_PER_WORKER:
                    break
                number, block = next(numbered, (sent, None))
                if block is None:
                    break
                decided = bool(report.invalid_rows) and not self._source.max_invalid_share
                self._send(worker, pickle.dumps((block, decided)))
                worker.waiting.append((number, block))
                sent += 1
            if sent == written:
                return
            for worker in self._answering():
                done[worker.waiting[0][0]] = self._received(worker)
                worker.waiting.popleft()
            while written in done:
                yield done.pop(written)
                written += 1

    def _answering(self) -> list[_Worker]:
        busy = {worker.connection: worker for worker in self._workers if worker.waiting}
        patience = max(patience_seconds(worker.waiting[0][1]) for worker in busy.values())
        found = wait(list(busy), patience)
        if not found:
            raise no_answer(self._source.name, next(iter(busy.values())).waiting[0][1])
        return [busy[connection] for connection in found if isinstance(connection, Connection)]

    def _send(self, worker: _Worker, message: bytes) -> None:
        try:
            worker.connection.send_bytes(message)
        except OSError as error:
            raise self._death(worker) from error

    def _received(self, worker: _Worker) -> TokenizedBlock:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(worker) from error
        if isinstance(answer, TokenizedBlock):
            return answer
        raise answer

    def _death(self, worker: _Worker) -> JobError:
        """Why a worker that hung up died; only the kernel knows whether its out-of-memory killer struck."""
        code = worker.process.wait()
        kills = oom_kills()
        if code == -signal.SIGKILL and kills is not None and kills > (self._kills_before or 0):
            return JobError(
                Reason.OUT_OF_MEMORY,
                f"A process that tokenized {self._source.name} was killed because memory ran out: give each worker "
                "more memory.",
            )
        return JobError(
            Reason.INTERNAL_ERROR,
            f"A process that tokenized {self._source.name} died ({_how(code)}): the log may hold its last words, and "
            "another attempt may succeed.",
        )


def _started() -> _Worker:
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer.data.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | _ENVIRONMENT,
        )
    return _Worker(process, ours)


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
