"""The real launcher with real ranks, all of them forked from a process that has everything loaded.

What differs from `python -m finetune_trainer` is only that nothing is imported anew: an attempt takes a second or two.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from finetune_api.outcome import TerminationMessage
from tests.fork_server import fork_server, one_thread
from tests.trainer.faults.faulty_worker import FOLDER, REMAINING, Fault
from tests.trainer.run.tiny_job import TinyJob

WORKER_MODULE = "tests.trainer.faults.faulty_worker"

_context = fork_server(
    "torch.distributed.run",
    "peft",
    "transformers.models.llama.modeling_llama",
    "finetune_trainer.launch.command",
    "finetune_trainer.launch.worker_process",
    "finetune_trainer.run",
    WORKER_MODULE,
)


class ForkedJob:
    """One attempt of a job.

    Args:
        job: what it runs.
        processes: ranks.
        fault: what happens to it.
        worker: module of its ranks, where it is another than that of faults.
        environ: further variables.
    """

    def __init__(
        self,
        job: TinyJob,
        *,
        processes: int = 1,
        fault: Fault | None = None,
        worker: str = WORKER_MODULE,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.job = job
        self._folder = job.folder / "attempt"
        self._folder.mkdir(exist_ok=True)
        for file in self._folder.iterdir():
            file.unlink()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FINETUNE_", "PET_"))}
        self._environ = {
            **inherited,
            FOLDER: str(self._folder),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "FINETUNE_NPROC_PER_NODE": str(processes),
            "FINETUNE_TERMINATION_MESSAGE_PATH": str(self._folder / "message"),
            "FINETUNE_CACHE_DIR": str(job.folder / "cache"),
            **(fault.environ() if fault else {}),
            **(environ or {}),
        }
        self._process = _context.Process(
            target=_launch, args=(self._environ, str(job.file()), str(self._folder), worker)
        )
        self._process.start()

    def end(self, *, meanwhile: Callable[[], None] = lambda: None, limit_seconds: float = 300.0) -> int:
        """Exit code, once it and its ranks have ended; negative after a signal.

        Args:
            meanwhile: called again and again.
        """
        deadline = time.monotonic() + limit_seconds
        while self._process.exitcode is None or any(map(_lives, self._ranks())):
            if time.monotonic() > deadline:
                for process in [self._process.pid, *self._ranks()]:
                    if process is not None and _lives(process):
                        os.kill(process, signal.SIGKILL)
                raise AssertionError(f"it hangs:\n{self.log()}")
            meanwhile()
            time.sleep(0.02)
        meanwhile()
        return self._process.exitcode

    def _ranks(self) -> list[int]:
        return [int(file.read_text()) for file in self._folder.glob("pid-?")]

    @property
    def fault_happened(self) -> bool:
        """Whether the point was reached."""
        return (self._folder / "fault").exists()

    @property
    def seconds_since_fault(self) -> float:
        """Between the fault and now."""
        return time.time() - (self._folder / "fault").stat().st_mtime

    def message(self) -> TerminationMessage | None:
        """What it wrote for the operator, if anything."""
        file = self._folder / "message"
        return TerminationMessage.parse(file.read_bytes()) if file.exists() else None

    def remaining_seconds(self) -> list[float]:
        """Every estimate that it made."""
        return [float(line) for line in (self._folder / REMAINING).read_text().split()]

    def log(self) -> str:
        """Everything it printed."""
        return (self._folder / "log").read_text()


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run_to_end(
    folder: Path,
    *,
    processes: int,
    worker: str = WORKER_MODULE,
    environ: Mapping[str, str] | None = None,
    **spec: Any,
) -> ForkedJob:
    """Run a job that is to succeed."""
    attempt = ForkedJob(TinyJob(folder, **spec), processes=processes, worker=worker, environ=environ)
    assert attempt.end() == 0, attempt.log()
    return attempt


def _launch(environ: Mapping[str, str], job_path: str, folder: str, worker: str) -> None:
    with (Path(folder) / "log").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from finetune_trainer.launch import alone
    from finetune_trainer.launch.command import main

    subprocess_handler.SubprocessHandler._popen = _fork  # type: ignore[method-assign,assignment]
    alone.start = partial(_fork, None)  # type: ignore[assignment]
    code = main([job_path], worker_module=worker)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Forked:
    """What elastic and the launcher use of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._collect(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        deadline = time.monotonic() + (timeout or 0.0)
        while self._collect(os.WNOHANG) is None and (timeout is None or time.monotonic() < deadline):
            time.sleep(0.01)
        return self.returncode

    def _collect(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _fork(_handler: Any, args: Sequence[str], environ: dict[str, str]) -> _Forked:
    pid = os.fork()
    if pid:
        return _Forked(pid)
    code = 1
    try:
        one_thread()
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # The sockets of the launcher's store are among them: as the worker's own they would outlive the launcher.
        tracker = resource_tracker.getfd()
        assert tracker is not None
        os.closerange(3, tracker)
        os.closerange(tracker + 1, 4096)
        os.environ.clear()
        os.environ.update(environ)
        logging.disable(logging.NOTSET)
        from finetune_trainer.launch.worker_process import main

        code = main(list(args[args.index("-m") + 2 :]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
