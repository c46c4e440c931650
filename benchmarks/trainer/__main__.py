"""`make bench`: our trainer beside TRL's, on the same optimizer steps, in one process, step by step in turn.

Which contestant begins changes with every step, so that whatever else the machine does falls on all. The report is
Markdown on standard output; what is going on is told on standard error.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.console import numbers, words

_ENVIRONMENT = {
    # Threads that spin while they wait are counted as work. Read by the library when it is loaded.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print the report."""
    options = _options(arguments)
    if any(os.environ.get(name) != value for name, value in _ENVIRONMENT.items()):
        command = [sys.executable, "-m", "benchmarks.trainer", *(sys.argv[1:] if arguments is None else arguments)]
        os.execve(sys.executable, command, os.environ | _ENVIRONMENT)  # noqa: S606 (no shell is wanted)
    from benchmarks.trainer.measure import Settings, measure

    measure(Settings(**vars(options)))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__)
    parser.add_argument(
        "--shapes", type=words, default="guard,tools,chat,short", help="of the data (default: %(default)s)"
    )
    parser.add_argument("--rows", type=numbers, default="8,32", help="rows a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="steps measured (default: %(default)s)")
    parser.add_argument(
        "--warm-up",
        type=int,
        default=1,
        help="steps before those that are measured; 0 where a step takes minutes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--trl-rows",
        type=numbers,
        default="8",
        help="rows of TRL's micro-batches; trl-fair tries all, TRL as shipped the first (default: %(default)s)",
    )
    parser.add_argument("--fair-only", action="store_true", help="leave TRL as shipped out, which is the slowest")
    parser.add_argument("--padding-free", action="store_true", help="try TRL's padding-free batches too")
    parser.add_argument("--profile", action="store_true", help="where one of our steps spends its time")
    parser.add_argument("--rss", action="store_true", help="peak memory of a step, each contestant in its own process")
    parser.add_argument(
        "--memory-gib", type=float, default=12.0, help="what a step may take at most (default: %(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
