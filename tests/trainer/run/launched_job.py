"""A job run as a user runs it: `python -m finetune_trainer`, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import psutil  # type: ignore[import-untyped]

from finetune_api.outcome import TerminationMessage
from tests.trainer.run.tiny_job import TinyJob


class LaunchedJob:
    """A running launcher with `processes` ranks.

    Args:
        job: what it runs.
        processes: ranks.
        environ: further variables.
    """

    def __init__(self, job: TinyJob, *, processes: int, environ: Mapping[str, str] | None = None) -> None:
        self.job = job
        self.message_path = job.folder / "termination-log"
        self.log_path = job.folder / "log"
        self.message_path.unlink(missing_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FINETUNE_", "PET_"))}
        environ = inherited | dict(environ or {})
        environ |= {
            "FINETUNE_NPROC_PER_NODE": str(processes),
            "FINETUNE_TERMINATION_MESSAGE_PATH": str(self.message_path),
            "FINETUNE_CACHE_DIR": str(job.folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetune_trainer", str(job.file())],
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait until the checkpoint of `step` or a later one is complete."""
        folder = self.job.output / "checkpoints"

        def there() -> bool:
            return any(int(path.parent.name[5:]) >= step for path in folder.glob("step-*/manifest.json"))

        self._wait(there, f"the checkpoint of step {step}")

    def kill(self) -> None:
        """End the launcher with all its ranks, as a power cut does: ranks alone would train on for a moment."""
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        for process in (self.process, *ranks):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(ranks)

    def end(self) -> int:
        """Exit code, once it has ended."""
        return self.process.wait(timeout=300)

    def message(self) -> TerminationMessage:
        """What it wrote for the operator."""
        message = TerminationMessage.parse(self.message_path.read_bytes())
        assert message is not None
        return message

    def log(self) -> str:
        """Everything it printed."""
        return self.log_path.read_text()

    def _wait(self, condition: Callable[[], bool], what: str, *, limit_seconds: float = 300.0) -> None:
        deadline = time.monotonic() + limit_seconds
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.log()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.log()}"
            time.sleep(0.02)
