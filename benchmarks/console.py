"""What every benchmark tells: where it runs, and how far it is."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median


def say(text: str) -> None:
    """What is going on, on standard error; the report has standard output to itself."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def machine() -> str:
    """Processor, memory, kernel and Python, without an end to the sentence."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({model}), {memory_gib:.0f} GiB of memory, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def words(text: str) -> list[str]:
    """The values of an option that takes several, with commas between them."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """The same for whole numbers."""
    return [int(number) for number in words(text)]


def span(values: Sequence[int]) -> str:
    """From the least to the most."""
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def three(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """Least, median and most."""
    return " / ".join(shown(value) for value in (min(values), median(values), max(values)))
