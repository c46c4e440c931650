"""One worker process on one node, without torch elastic: there is nobody to meet, and loading PyTorch in the launcher,
which loads it again in the worker, takes a fifth of the time until the first step of a small job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from finetune_trainer.launch.elastic import ProcessFailure, find_free_port


def run_worker(worker: Sequence[str], *, grace_seconds: float) -> dict[int, ProcessFailure]:
    """As `elastic.run_workers`, of a single one. Whatever interrupts it ends the worker as well.

    Args:
        worker: module and arguments of `python -m`.
        grace_seconds: between SIGTERM and SIGKILL.
    """
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    environ = {
        **os.environ,
        **{name: str(value) for name, value in ranks.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_port()),
    }
    process = start([sys.executable, "-u", "-m", *worker], environ)
    try:
        code = process.wait()
    except BaseException:
        _end(process, grace_seconds)
        raise
    return {0: ProcessFailure(code=code, at=time.time())} if code else {}


def start(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The worker, in a process group of its own, which its data loaders belong to as well."""
    return subprocess.Popen(command, env=environ, start_new_session=True)


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(grace_seconds)
    except ProcessLookupError:
        process.wait()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
