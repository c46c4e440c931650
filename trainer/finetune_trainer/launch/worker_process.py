"""What torch elastic runs for each rank: `python -m finetune_trainer.launch.worker_process MODULE JOB.yaml`.

Calls `MODULE.main(job_path)`, which returns a TerminationMessage or raises, and makes sure that whatever happens
leaves this rank's last words and an exit code that tells the user's failures from the world's.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune_api.outcome import Reason, TerminationMessage
from finetune_trainer.errors import JobError
from finetune_trainer.launch import environment, outcome_files
from finetune_trainer.launch.failures import exit_code, last_words, redact
from finetune_trainer.signals import stop_at_once

_EXIT_SECONDS_AFTER_FAILURE = 20
_EXIT_SECONDS_AFTER_SUCCESS = 120
"""How long the interpreter may take to end. Communication libraries are known to hang there once a peer is gone; after
a success, experiment loggers may still be sending."""


def check_world_size(environ: Mapping[str, str]) -> None:
    """Compare the number of workers with the number that the operator asked for.

    Raises:
        JobError: WorldSizeMismatch, when they differ; a run at another size would be another training.
    """
    expected = environment.whole_number(environ, environment.EXPECTED_WORLD_SIZE)
    actual = int(environ["WORLD_SIZE"])
    if expected is not None and expected != actual:
        raise JobError(
            Reason.WORLD_SIZE_MISMATCH,
            f"{actual} worker processes found each other where the job asks for {expected}: "
            "check workers.nodes, workers.gpusPerNode and the GPUs that each pod can see.",
        )


def attempt(work: Callable[[], TerminationMessage], environ: Mapping[str, str]) -> TerminationMessage:
    """The last words of this rank after `work`; a failure that was not foreseen is printed with its stack trace."""
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    try:
        with stop_at_once():
            check_world_size(environ)
            return work().model_copy(update={"rank": rank})
    except BaseException as error:  # nothing may end a rank without its last words
        message = last_words(error, rank=rank, world_size=world_size, environ=environ)
        if message.reason is Reason.INTERNAL_ERROR:
            print(redact("".join(traceback.format_exception(error)), environ), file=sys.stderr, flush=True)
        return message


def end_with_launcher(launcher_pid: int, *, poll_seconds: float = 1.0) -> None:
    """Watch from a thread that the launcher lives. Without it a killed launcher would leave ranks that train on.

    Kills the whole process group, data loaders included: elastic gives each worker a group of its own.
    """

    def watch() -> None:
        while os.getppid() == launcher_pid:
            time.sleep(poll_seconds)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()


def main(arguments: list[str]) -> int:
    """Run one rank; the exit code is that of its last words."""
    module_name, job_path = arguments
    folder = Path(os.environ[environment.OUTCOME_DIR])
    rank = int(os.environ["RANK"])
    outcome_files.mark_started(folder, rank)
    end_with_launcher(int(os.environ[environment.LAUNCHER_PID]))

    def work() -> TerminationMessage:
        result = importlib.import_module(module_name).main(Path(job_path))
        if not isinstance(result, TerminationMessage):
            raise TypeError(f"{module_name}.main returned {type(result).__name__} instead of a TerminationMessage")
        return result

    message = attempt(work, os.environ)
    # Written before anything else can go wrong: from here on only the exit code could still be spoilt.
    outcome_files.write_outcome(folder, rank, message)
    # The interpreter's own thread, so that it works even while a C++ destructor holds everything else.
    faulthandler.dump_traceback_later(
        _EXIT_SECONDS_AFTER_SUCCESS if message.succeeded else _EXIT_SECONDS_AFTER_FAILURE, exit=True
    )
    return exit_code(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
