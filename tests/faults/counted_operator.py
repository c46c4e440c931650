"""`python counted_operator.py FILE`: the operator, which says on SIGUSR1 how much it keeps: tasks, memory, objects.

Each signal adds one line to the file.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGES = ("finetune_operator", "finetune_api", "kopf")


@dataclass(frozen=True)
class Count:
    """How much a process keeps at one moment, garbage not included."""

    tasks: int
    """Of asyncio."""
    files: int
    """Open file descriptors, sockets among them."""
    resident_mib: float
    """Memory (MiB)."""
    everything: int
    """Objects that the garbage collector knows."""
    objects: dict[str, int]
    """Instances of classes of ours and of kopf's, by module and name."""


def count() -> Count:
    """How much this process keeps."""
    gc.collect()
    found = gc.get_objects()
    classes = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in found)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Count(
        tasks=len(asyncio.all_tasks()),
        files=len(list(Path("/proc/self/fd").iterdir())),
        resident_mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        everything=len(found),
        objects={name: number for name, number in classes.items() if name.startswith(PACKAGES)},
    )


def read_counts(file: Path) -> list[Count]:
    """What was written so far."""
    return [Count(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":

    def tell(*_: object) -> None:
        with Path(sys.argv[1]).open("a") as lines:
            lines.write(json.dumps(asdict(count())) + "\n")

    signal.signal(signal.SIGUSR1, tell)
    from finetune_operator.__main__ import main

    sys.exit(main())
