"""Every environment variable that the launcher reads or hands to its workers, and the numbers derived from them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

TERMINATION_MESSAGE_PATH = "FINETUNE_TERMINATION_MESSAGE_PATH"
"""File that receives the termination message of this node, once. In a pod: the container's terminationMessagePath."""

NPROC_PER_NODE = "FINETUNE_NPROC_PER_NODE"
"""Worker processes on this node. Default: PET_NPROC_PER_NODE, else one per visible GPU, else 1."""

EXPECTED_WORLD_SIZE = "FINETUNE_EXPECTED_WORLD_SIZE"
"""Worker processes over all nodes that the operator asked for. Another number ends the attempt (WorldSizeMismatch).
Unset on a laptop: there a job that asks for eight GPUs trains on what the machine has."""

GRACE_SECONDS = "FINETUNE_GRACE_SECONDS"
"""Seconds (whole) that workers have after SIGTERM to write a checkpoint. Keep it some seconds below the pod's
terminationGracePeriodSeconds, whose default is 30. Default 25."""

OUTCOME_DIR = "FINETUNE_OUTCOME_DIR"
"""Set by the launcher for its workers: the folder where each rank leaves its last words."""

LAUNCHER_PID = "FINETUNE_LAUNCHER_PID"
"""Set by the launcher for its workers: the process they must not outlive."""

DEFAULT_GRACE_SECONDS = 25


def whole_number(environ: Mapping[str, str], name: str) -> int | None:
    """The variable `name` as an integer of at least 1, or None when it is unset or empty.

    Raises:
        JobError: InvalidSpec when it is anything else.
    """
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise JobError(Reason.INVALID_SPEC, f"{name} is {text!r}; set it to a whole number of at least 1 or unset it.")
    return int(text)


def grace_seconds(environ: Mapping[str, str]) -> int:
    """Seconds between SIGTERM and SIGKILL of the workers."""
    return whole_number(environ, GRACE_SECONDS) or DEFAULT_GRACE_SECONDS


def threads_per_worker(*, cores: int, cpu_max: str | None, workers: int) -> int:
    """Computing threads for each of `workers` processes on this node.

    Args:
        cores: cores that the process may be scheduled on.
        cpu_max: text of the cgroup's cpu.max ("QUOTA PERIOD" in microseconds, or "max PERIOD"). A pod with a CPU
            limit sees all cores of its node; with a thread on each, it would be throttled most of the time.
    """
    quota, _, period = (cpu_max or "max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // workers)
