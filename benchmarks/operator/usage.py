"""What processes use: CPU time and memory, as Linux counts them below /proc."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
MIB = 1024


@dataclass(frozen=True)
class Usage:
    """CPU seconds so far: of each process by its name, and of the whole machine."""

    processes: Mapping[str, float]
    machine: float

    def since(self, before: Usage) -> Usage:
        """What was used after `before`."""
        used = {name: seconds - before.processes.get(name, 0.0) for name, seconds in self.processes.items()}
        return Usage(used, self.machine - before.machine)

    @property
    def others(self) -> float:
        """What the rest of the machine used, the kernel's own threads among it."""
        return max(0.0, self.machine - sum(self.processes.values()))


def usage(pids: Mapping[str, int]) -> Usage:
    """CPU seconds so far of these processes and of the machine."""
    return Usage({name: cpu_seconds(pid) for name, pid in pids.items()}, _machine_seconds())


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process has used, in user mode and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_mib(pid: int) -> float:
    """Memory that a process holds now (MiB)."""
    return _status(pid, "VmRSS") / MIB


def peak_mib(pid: int) -> float:
    """Most memory that a process has held so far (MiB)."""
    return _status(pid, "VmHWM") / MIB


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def _machine_seconds() -> float:
    user, nice, system, _idle, _waiting, *interrupts = map(
        int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    )
    # Stolen time (the third of the rest) is used by nobody here; guests' is in user's already.
    return (user + nice + system + sum(interrupts[:2])) / _TICKS
