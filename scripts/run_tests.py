"""Runs what `make test` proves: checks, and the tests in five lanes, while the Go programs that they need are built.

Tests on a control plane wait for it most of the time, each lane for its own, and the others compute: side by side they
take little longer than the work in them. Lines come as they are written, with the lane's name in front, and a test
that fails is shown at once. A check or a build that fails ends the run. How steps that failed had ended is said again
at the end, behind what the others wrote since.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ("tests/cluster", "tests/chart")
FAULTS = ("tests/faults", "tests/integrations")
MODELS = ("tests/architectures", "tests/trainer/data", "tests/trainer/model", "tests/trainer/merge")
RUNS = (
    "tests/cli",
    "tests/examples",
    *(f"tests/trainer/{name}" for name in ("faults", "launch", "publish", "run", "storage", "train", "verify")),
)
WITH_TARGETS_OF_THEIR_OWN = ("tests/node", "tests/serving")
PYTEST = (sys.executable, "-m", "pytest", "--durations=10")
BUILD = (sys.executable, "tests/tools/build.py", "--for")
GENTLY = ("nice", "-n", "10")
"""Tests that wait for each other are worth more than a build that nobody waits for yet."""
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Threads that share cores with another lane take several times as long; those that spin while they wait, longer."""
LAST_LINES = 15
"""Of a step that failed, said again at the end: pytest names there what failed."""
END_SECONDS = 60
"""How long a step may take to end when it is interrupted: tests take their servers down."""


@dataclass(frozen=True, eq=False)
class Step:
    """A command of the run."""

    name: str
    command: Sequence[str]
    after: str | None = None
    """Step that has to have succeeded."""
    is_lane: bool = False
    """Its failure leaves the other lanes running; that of any other step ends the run."""
    is_quiet: bool = False
    """What it writes is shown only when it fails."""
    environment: Mapping[str, str] = field(default_factory=dict)


STEPS = (
    Step("build", (*GENTLY, *BUILD, "cluster"), is_quiet=True),
    Step("build the rest", (*GENTLY, *BUILD, "test"), after="build", is_quiet=True),
    Step("check", (os.environ.get("MAKE", "make"), "check")),
    Step("cluster", (*PYTEST, *CLUSTER), after="build", is_lane=True, environment=THREADS),
    Step("faults", (*PYTEST, *FAULTS), after="build", is_lane=True, environment=THREADS),
    Step("models", (*PYTEST, *MODELS), is_lane=True, environment=THREADS),
    Step("runs", (*PYTEST, *RUNS), is_lane=True, environment=THREADS),
    Step(
        "others",
        (
            *PYTEST,
            *(f"--ignore={folder}" for folder in (*CLUSTER, *FAULTS, *MODELS, *RUNS, *WITH_TARGETS_OF_THEIR_OWN)),
        ),
        is_lane=True,
        environment=THREADS,
    ),
)


class Run:
    """One run of steps; `main` makes one of STEPS."""

    def __init__(self, steps: Sequence[Step], folder: Path = ROOT) -> None:
        self._waiting = list(steps)
        self._folder = folder
        self._width = max(len(step.name) for step in steps)
        self._running: dict[Step, subprocess.Popen[str]] = {}
        self._lines: queue.SimpleQueue[tuple[Step, str | None]] = queue.SimpleQueue()
        """What steps write; None is the end."""
        self._kept: dict[Step, list[str]] = {step: [] for step in steps}
        """What quiet steps have written."""
        self._last = {step: deque[str](maxlen=LAST_LINES) for step in steps}
        self._failed: list[Step] = []
        self._begun: dict[Step, float] = {}
        self._exit_code = 0
        self._deadline: float | None = None
        """When what still runs is killed, once the run is to end."""

    def run(self) -> int:
        """Run all steps; the exit code: 0, 1 when a step failed, 130 when somebody interrupted it."""
        self._start_after(None)
        while self._running:
            try:
                self._go_on()
            except KeyboardInterrupt:
                print("Interrupted: the tests take their servers down…", flush=True)
                self._exit_code = 128 + signal.SIGINT
                self._interrupt()
        self._say_again_what_failed()
        return self._exit_code

    def _say_again_what_failed(self) -> None:
        for step in self._failed:
            print(f"\nThe end of {step.name}, which failed:", flush=True)
            for line in self._last[step]:
                self._print(step, line)

    def _go_on(self) -> None:
        """Wait for what a step writes, or for its end."""
        try:
            step, line = self._lines.get(timeout=self._seconds_left())
        except queue.Empty:
            self._kill()
            return
        if line is None:
            self._end(step)
        else:
            self._show(step, line)

    def _start_after(self, name: str | None) -> None:
        for step in [step for step in self._waiting if step.after == name]:
            self._waiting.remove(step)
            self._start(step)

    def _start(self, step: Step) -> None:
        self._begun[step] = time.monotonic()
        process = subprocess.Popen(
            step.command,
            cwd=self._folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100", **step.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C is for this process alone, which interrupts each step once: a second signal would cut a test short
            # that is taking its servers down.
            start_new_session=True,
        )
        self._running[step] = process
        threading.Thread(target=self._read, args=(step, process.stdout), daemon=True).start()

    def _read(self, step: Step, output: IO[str]) -> None:
        with output:
            for line in output:
                self._lines.put((step, line))
        self._lines.put((step, None))

    def _show(self, step: Step, line: str) -> None:
        self._last[step].append(line)
        if step.is_quiet:
            self._kept[step].append(line)
        else:
            self._print(step, line)

    def _print(self, step: Step, line: str) -> None:
        print(f"{step.name:{self._width}} | {line.rstrip()}", flush=True)

    def _end(self, step: Step) -> None:
        code = self._running.pop(step).wait()
        took = f"{time.monotonic() - self._begun[step]:.0f} s"
        if code == 0:
            self._print(step, f"done in {took}")
            self._start_after(step.name)
        elif self._deadline is None:
            for line in self._kept[step]:
                self._print(step, line)
            self._print(step, f"FAILED after {took}")
            self._exit_code = 1
            self._failed.append(step)
            if not step.is_lane:
                self._interrupt()

    def _interrupt(self) -> None:
        """Start nothing more, and ask what runs to end; a second time it is told to."""
        if self._deadline is not None:
            self._kill()
        self._waiting.clear()
        self._signal(signal.SIGINT)
        self._deadline = time.monotonic() + END_SECONDS

    def _kill(self) -> None:
        """End what runs without asking."""
        self._signal(signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _signal(self, number: int) -> None:
        """To all processes of all steps."""
        for process in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def main() -> int:
    """Run STEPS."""
    # Whoever ends the run from outside interrupts it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return Run(STEPS).run()


if __name__ == "__main__":
    sys.exit(main())
