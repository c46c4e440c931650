"""Servers that tests run as processes: tied to the tests' life, with a log that is shown when they do not start.

A test run that is killed takes its servers with it; nothing is left that holds a port or a folder.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 60
STOP_SECONDS = 15
LOG_LINES = 25
PORTS = range(15_000, 30_000)
"""Below what systems give to outgoing connections, one of which could take the port of a server that is restarting."""


class StartError(RuntimeError):
    """A server did not start; the text holds the end of its log."""


def tethered(command: Sequence[str | Path]) -> list[str]:
    """The command, made to end with the thread that starts it: also when nobody is left to end it."""
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *map(str, command)]


def unused_port() -> int:
    """A loopback port that nobody listens on now."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@dataclass
class Server:
    """A program that runs until it is stopped, and can be started again."""

    name: str
    command: Sequence[str | Path]
    log: Path
    """Appended to by every start."""
    ready: Callable[[], bool]
    """Whether it answers; exceptions of the network count as no."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables on top of the tests' own."""
    without: str | None = None
    """Prefix of the tests' own variables that are withheld."""
    patience_seconds: float = STOP_SECONDS
    """How long it may take to end when asked to."""
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id while it runs.

        Raises:
            RuntimeError: it was not started.
        """
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started.")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the last run (negative: the signal that ended it), None while it runs or before."""
        return None if self._process is None else self._process.poll()

    def launch(self) -> None:
        """Start it without waiting for it to answer; nothing happens when it runs."""
        if self.running:
            return
        inherited = {k: v for k, v in os.environ.items() if self.without is None or not k.startswith(self.without)}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                tethered(self.command),
                env={**inherited, **self.environment},
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for who started the servers: it ends them in the right order.
                start_new_session=True,
            )

    def wait_ready(self, timeout_seconds: float = START_SECONDS) -> None:
        """Return once it answers.

        Raises:
            StartError: it ended, or took too long.
        """
        deadline = time.monotonic() + timeout_seconds
        while self.running and time.monotonic() < deadline:
            if self._answers():
                return
            time.sleep(0.05)
        what = f"did not answer in {timeout_seconds:.0f} s" if self.running else f"ended with {self.exit_code}"
        raise StartError(f"{self.name} {what}; {self.log} ends with:\n{self.log_tail()}")

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            StartError: it ended, or took too long.
        """
        self.launch()
        self.wait_ready()

    def stop(self) -> int | None:
        """Ask it to end, insist after a while, and return the exit code; nothing happens when it does not run."""
        if self._process is None:
            return None
        if self.running:
            self._process.terminate()
        try:
            return self._process.wait(timeout=self.patience_seconds)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int | None:
        """End it as a power cut does."""
        if self._process is None:
            return None
        self._process.kill()
        return self._process.wait()

    def restart(self) -> None:
        """Stop and start.

        Raises:
            StartError: it ended, or took too long.
        """
        self.stop()
        self.start()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It is stopped while this lasts, and started again whatever happens."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def log_size(self) -> int:
        """Length of the log in bytes: where what comes next will begin."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_tail(self, lines: int = LOG_LINES, since: int = 0) -> str:
        """Last lines of the log behind a position that `log_size` gave."""
        if not self.log.exists():
            return "(nothing)"
        with self.log.open("rb") as file:
            file.seek(since)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

    def _answers(self) -> bool:
        try:
            return self.ready()
        except OSError:
            return False


def _run_tethered(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == parent:  # or it had ended before it could be told of
        os.execv(command[0], command)  # noqa: S606 (no shell is wanted)


if __name__ == "__main__":
    _run_tethered(int(sys.argv[1]), sys.argv[2:])
