"""Asks the kernel whether its out-of-memory killer struck here.

A worker that dies of SIGKILL says nothing; the cgroup's `oom_kill` counter tells this death from any other.
Source: docs.kernel.org/admin-guide/cgroup-v2.html, "memory.events".
"""

from __future__ import annotations

from pathlib import Path


def own_cgroup(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> Path:
    """Folder of the control group (v2) that this process is in.

    Raises:
        OSError: the system has none.
        StopIteration: likewise.
    """
    memberships = (proc / "self/cgroup").read_text().splitlines()
    own = next(line[len("0::") :] for line in memberships if line.startswith("0::"))
    return cgroup_root / own.lstrip("/")


def oom_kills(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Processes of our own cgroup that the out-of-memory killer has ended; None where the kernel does not tell."""
    try:
        events = (own_cgroup(proc, cgroup_root) / "memory.events").read_text()
        return next(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))
    except (OSError, StopIteration, ValueError, IndexError):
        # cgroup v1, the root cgroup and other operating systems have no such file; then nothing is known.
        return None
