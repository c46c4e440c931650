"""Memory of a step: what it takes at most, and a bound above which a contestant is left out.

A machine that is shared must not be brought to its knees by a batch that is too large for it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.operator.usage import peak_mib, resident_mib


@dataclass(frozen=True)
class Peak:
    """Resident memory of a process around one step (MiB); nothing when the process died."""

    before: float = 0.0
    most: float = 0.0
    fits: bool = False
    """Whether it needed no more than was allowed."""


def peak_of(step: Callable[[], object]) -> Peak:
    """Run `step` in this process and look."""
    before, fits = resident_mib(os.getpid()), True
    # Forgets the peak that loading the model has left.
    Path("/proc/self/clear_refs").write_text("5")
    try:
        step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    return Peak(before, peak_mib(os.getpid()), fits)


def limit_memory(gib: float) -> None:
    """Let allocations fail once this process has `gib` resident; to be called again before every step.

    The kernel bounds what is mapped, and more is mapped than resident: files of weights, and what a step has freed and
    the allocator keeps in pieces. So memory that is free is given back first, and the difference allowed.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mapped, resident = (1024 * int(status[key].split()[0]) for key in ("VmData", "VmRSS"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (mapped + max(0, int(gib * 2**30) - resident), hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed; torch says so in a RuntimeError's text only."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def peak_alone(measure: Callable[[], Peak]) -> Peak:
    """What `measure`, which can be pickled, finds in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure).result()
        except BrokenProcessPool:
            return Peak()
