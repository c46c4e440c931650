"""Cores that this process may use: what the scheduler and the control group leave of the machine's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune_trainer.launch.environment import threads_per_worker


def threads_here(workers: int = 1) -> int:
    """Computing threads for each of `workers` processes on this node, at least 1."""
    return threads_per_worker(cores=_scheduled_cores(), cpu_max=_cpu_max(), workers=workers)


def _scheduled_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_max() -> str | None:
    try:
        return Path("/sys/fs/cgroup/cpu.max").read_text()
    except OSError:
        return None
