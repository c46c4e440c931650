"""Runs the real launcher in a process of its own, several times faster than from cold: a fork server has torch loaded.

Everything after the import is as in `python -m finetune_trainer`: main thread, signals, worker processes, files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from finetune_api.outcome import TERMINATION_MESSAGE_LIMIT_BYTES, TerminationMessage
from tests.fork_server import fork_server
from tests.trainer.launch.scripted_worker import SCRIPT

WORKER_MODULE = "tests.trainer.launch.scripted_worker"
FOLDER = "FINETUNE_TEST_FOLDER"
JOB = """\
model_id: ./model
train_path: ./train.jsonl
context_length: 512
task: causal_lm
lora_config: {r: 8}
generation_config:
  prompt_format:
    system: "{instruction}"
    user: "{instruction}"
    assistant: "{instruction}</s>"
    trailing_assistant: ""
"""

_context = fork_server("torch.distributed.run", "finetune_trainer.launch.command")


def wait_until(condition: Callable[[], bool], what: str, *, limit_seconds: float = 60.0) -> None:
    """Poll `condition`; a generous limit keeps a broken launcher from hanging the suite."""
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


class LauncherProcess:
    """A launcher with scripted workers, one per entry of `actions` (the index is the rank)."""

    def __init__(self, folder: Path, *actions: str, environ: Mapping[str, str] | None = None, job: str = JOB) -> None:
        self.folder = folder
        self.job_path = folder / "job.yaml"
        self.job_path.write_text(job)
        self.message_path = folder / "termination-log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FINETUNE_", "PET_"))}
        self.environ = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(folder),
            FOLDER: str(folder),
            SCRIPT: json.dumps({str(rank): action for rank, action in enumerate(actions)}),
            "FINETUNE_NPROC_PER_NODE": str(len(actions)),
            "FINETUNE_TERMINATION_MESSAGE_PATH": str(self.message_path),
            **(environ or {}),
        }
        self._process = _context.Process(target=_run, args=(self.folder, self.environ, str(self.job_path)))
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait_ready(self, *ranks: int) -> None:
        """Wait until the workers of `ranks` wait for a stop signal."""
        wait_until(lambda: all((self.folder / f"ready-{rank}").exists() for rank in ranks), "workers")

    def worker_pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())

    def worker_environ(self, rank: int) -> dict[str, str]:
        """What the worker of `rank` found in its environment."""
        environ: dict[str, str] = json.loads((self.folder / f"environment-{rank}.json").read_text())
        return environ

    def end(self, *, limit_seconds: float = 60.0) -> int:
        """Exit code of the launcher, once it has ended."""
        self._process.join(limit_seconds)
        assert self._process.exitcode is not None, f"the launcher still runs:\n{self.stderr()}"
        return self._process.exitcode

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def message(self) -> TerminationMessage:
        data = self.message_path.read_bytes()
        assert len(data) <= TERMINATION_MESSAGE_LIMIT_BYTES
        message = TerminationMessage.parse(data)
        assert message is not None
        return message


def _run(folder: Path, environ: Mapping[str, str], job_path: str) -> None:
    for stream, name in ((1, "stdout"), (2, "stderr")):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored when the suite runs in a shell's background
    os.environ.clear()
    os.environ.update(environ)
    from finetune_trainer.launch.command import main

    code = main([job_path], worker_module=WORKER_MODULE)
    sys.stderr.flush()
    os._exit(code)
