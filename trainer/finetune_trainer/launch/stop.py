"""Stop signals of the launcher: the first lets the workers save a checkpoint, the second ends everything at once.

Python runs a signal handler only between its own instructions, but torch's rendezvous and barriers block in C++ for
minutes. A thread on the interpreter's wakeup descriptor hears signals there too. As process 1 of a container the
launcher would otherwise ignore them altogether.
"""

from __future__ import annotations

import select
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

LAUNCHER_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class LauncherStopped(BaseException):
    """Raised in the main thread by the first stop signal; elastic then sends SIGTERM to the workers and waits."""


class StopWatch:
    """Within its block, stop signals are handled as the module says.

    Args:
        workers_run: whether there are workers that should get their time; without any, the first signal ends all.
        end_at_once: called from another thread with the signal's name; must end the process.
        patience_seconds: time from the first signal after which `end_at_once` is called in any case.
    """

    def __init__(
        self, *, workers_run: Callable[[], bool], end_at_once: Callable[[str], None], patience_seconds: float
    ) -> None:
        self._workers_run = workers_run
        self._end_at_once = end_at_once
        self._patience_seconds = patience_seconds
        self._heard, self._wakeup = socket.socketpair()
        self._main_told = False
        self.over = False
        """True once the workers have ended: later signals change nothing."""

    def __enter__(self) -> Self:
        self._wakeup.setblocking(False)
        # A full buffer means that somebody sends signals by the thousand; one of them has been heard.
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for name in LAUNCHER_STOP_SIGNALS:
            # What the parent had us ignore stays ignored: nohup, and shells that start a job in the background.
            if signal.getsignal(name) is not signal.SIG_IGN:
                signal.signal(name, self._tell_main)
        threading.Thread(target=self._listen, name="stop-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The handlers stay: between here and the end of the process a signal must not spoil the last words.
        self.over = True

    def _tell_main(self, signum: int, _frame: FrameType | None) -> None:
        if not self.over and not self._main_told:
            self._main_told = True
            raise LauncherStopped(signal.Signals(signum).name)

    def _listen(self) -> None:
        first: str | None = None
        while True:
            ready, _, _ = select.select([self._heard], [], [], None if first is None else self._patience_seconds)
            numbers = self._heard.recv(64) if ready else b""
            names = [signal.Signals(number).name for number in numbers if number in LAUNCHER_STOP_SIGNALS]
            if self.over:
                return
            for name in names:
                if first is not None or not self._workers_run():
                    self._end_at_once(name)
                first = name
            if first is not None and not ready:
                self._end_at_once(first)
