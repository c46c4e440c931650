"""Examines cases in processes that are forked from this one, which has imported everything once.

A process per case: a case that crashes, hangs or leaves a changed library behind is a result, and hurts no other.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.architectures.cases import Case
from tests.architectures.record import Record
from tests.fork_server import one_thread

CASE_SECONDS = 300.0
"""After which a case counts as hanging. Ten is usual."""


@dataclass
class _Running:
    case: Case
    process: int
    folder: Path
    began: float


def examine_all(
    cases: Iterable[Case],
    done: Callable[[Record], None],
    *,
    jobs: int,
    launched: frozenset[str] = frozenset(),
    until: float | None = None,
) -> None:
    """Examine `cases`, `jobs` at a time.

    Args:
        cases: in order.
        done: is told of each as it ends.
        jobs: processes.
        launched: names of cases to run by `finetune run` too.
        until: time.monotonic() after which no case is begun.
    """
    # Threads do not survive a fork, and several processes share the cores.
    import torch

    torch.set_num_threads(1)
    waiting, running = list(cases), list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs and (until is None or time.monotonic() < until):
            case = waiting.pop(0)
            running.append(_start(case, launched=case.name in launched))
        if not running:
            return
        time.sleep(0.05)
        for one in list(running):
            ended, status = os.waitpid(one.process, os.WNOHANG)
            if not ended and time.monotonic() - one.began > CASE_SECONDS:
                os.kill(one.process, signal.SIGKILL)
                os.waitpid(one.process, 0)
                ended, status = one.process, signal.SIGKILL
            if ended:
                running.remove(one)
                done(_result(one, os.waitstatus_to_exitcode(status)))
                shutil.rmtree(one.folder, ignore_errors=True)


def _start(case: Case, *, launched: bool) -> _Running:
    folder = Path(tempfile.mkdtemp(prefix="finetune-models-"))
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            one_thread()
            _examine(case, folder, launched=launched)
            code = 0
        finally:
            # Not by an exception: what this process shares with its parent is not its own to tidy.
            os._exit(code)
    return _Running(case, process, folder, time.monotonic())


def _examine(case: Case, folder: Path, *, launched: bool) -> None:
    from tests.architectures.examine import examine

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        examine(case, folder / "work", launched=launched).write(folder / "record.json")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise


def _result(ended: _Running, exit_code: int) -> Record:
    path = ended.folder / "record.json"
    if path.is_file():
        return Record.read(path)
    record = Record(ended.case.name, ended.case.model_type, why_not=ended.case.why_not)
    log = (ended.folder / "log").read_text(errors="replace").strip().splitlines() or ["no output"]
    hung = time.monotonic() - ended.began > CASE_SECONDS
    record.sentence = f"no answer in {CASE_SECONDS:.0f} s" if hung else f"examination ended with {exit_code}: {log[-1]}"
    record.seconds = round(time.monotonic() - ended.began, 1)
    return record
