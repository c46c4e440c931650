"""A worker to which one fault happens at a named point, as the environment says."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from finetune_api.outcome import TerminationMessage
from finetune_trainer.launch.environment import LAUNCHER_PID
from tests.trainer.faults.fault_points import FORWARDS, POINTS, poison, replace

TIMEOUT = "FINETUNE_TEST_TIMEOUT"
"""Seconds after which a collective is given up."""
NAN = "FINETUNE_TEST_NAN"
"""Step in which the last rank has a gradient that is no number."""
REMAINING = "remaining"
"""File with the remaining seconds of every report of progress, a line each."""
FAULT = "FINETUNE_TEST_FAULT"
FOLDER = "FINETUNE_TEST_FOLDER"
LAUNCHER = "launcher"

_NOTICED_SECONDS = 20.0
"""A signal to the launcher comes back to its ranks in a fraction of it."""


@dataclass(frozen=True)
class Fault:
    """What happens, where, and to whom."""

    point: str
    """One of POINTS."""
    rank: int = 0
    """Whose run reaches the point."""
    action: str = "kill"
    """kill: SIGKILL. stop: SIGTERM to the launcher, as a kubelet does it. hang: SIGSTOP. slow: a pause. back: the clock
    goes back an hour. memory: runs out."""
    victims: tuple[int | str, ...] = (0,)
    """Ranks, or the launcher with all its ranks."""
    seconds: float = 2.0
    """Of a pause."""

    def environ(self) -> dict[str, str]:
        """What makes it happen to a worker."""
        return {FAULT: json.dumps(asdict(self))}

    def happens(self, folder: Path) -> None:
        """Now. Leaves a file, so that a test knows of it."""
        (folder / "fault").touch()
        if self.action == "stop":
            _stop_launcher()
        elif self.action == "slow":
            time.sleep(self.seconds)
        elif self.action == "memory":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        elif self.action == "back":
            real = time.time
            time.time = lambda: real() - 3600
        else:
            number = signal.SIGKILL if self.action == "kill" else signal.SIGSTOP
            for process in self._processes(folder):
                os.kill(process, number)

    def _processes(self, folder: Path) -> list[int]:
        """Those that it happens to, this one last."""
        ranks: tuple[int | str, ...] = self.victims
        found = []
        if LAUNCHER in ranks:
            found, ranks = [int(os.environ[LAUNCHER_PID])], tuple(range(int(os.environ["FINETUNE_NPROC_PER_NODE"])))
        return sorted([*found, *(_process(folder, int(rank)) for rank in ranks)], key=lambda pid: pid == os.getpid())


def _process(folder: Path, rank: int) -> int:
    file = folder / f"pid-{rank}"
    while not file.exists():
        time.sleep(0.01)
    return int(file.read_text())


def _stop_launcher() -> None:
    """Send it SIGTERM, and wait until it has told this rank."""
    ours, waked = os.pipe()
    os.set_blocking(waked, False)
    try:
        signal.set_wakeup_fd(waked)
    except ValueError:
        # A thread of ours hears no signals.
        os.kill(int(os.environ[LAUNCHER_PID]), signal.SIGTERM)
        time.sleep(1.0)
        return
    os.kill(int(os.environ[LAUNCHER_PID]), signal.SIGTERM)
    try:
        select.select([ours], [], [], _NOTICED_SECONDS)
    finally:
        signal.set_wakeup_fd(-1)


def _give_up_after(timeout: timedelta) -> None:
    from finetune_trainer.train import collective
    from finetune_trainer.train.collective import Ranks

    replace(f"{collective.__name__}:TIMEOUT", lambda _: timeout)
    (Ranks.__init__.__kwdefaults__ or {})["timeout"] = timeout


def _recorded(update: Any, folder: Path) -> Any:
    def recording(self: Any, progress: Any) -> None:
        if progress.remaining_seconds is not None:
            with (folder / REMAINING).open("a") as file:
                file.write(f"{progress.remaining_seconds}\n")
        update(self, progress)

    return recording


def main(job_path: Path) -> TerminationMessage:
    """Run one rank."""
    import finetune_trainer.run  # noqa: F401  what is replaced has to be imported
    from finetune_trainer import worker

    folder, rank = Path(os.environ[FOLDER]), int(os.environ["RANK"])
    partial = folder / f"pid-{rank}.partial"
    partial.write_text(str(os.getpid()))
    partial.rename(folder / f"pid-{rank}")
    if TIMEOUT in os.environ:
        _give_up_after(timedelta(seconds=float(os.environ[TIMEOUT])))
    replace("finetune_trainer.train.progress:ProgressReporter.update", lambda update: _recorded(update, folder))
    if FAULT in os.environ:
        fault = Fault(**json.loads(os.environ[FAULT]))
        if fault.rank == rank:
            (POINTS | FORWARDS)[fault.point](lambda: fault.happens(folder))
    if NAN in os.environ and rank + 1 == int(os.environ["WORLD_SIZE"]):
        poison(int(os.environ[NAN]))
    return worker.main(job_path)
