"""How a worker learns that it should stop.

While it prepares, a stop signal simply ends the work: nothing would be lost. While it trains, the signal only raises
a flag, so that the step under way finishes and a checkpoint is written. A second signal ends the work in both cases.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Handler = Callable[[int, FrameType | None], None]


class StopRequested(BaseException):
    """The process was asked to end. As KeyboardInterrupt it is no Exception, so that no `except Exception` eats it."""


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Let `handler` receive the stop signals; the previous handlers return afterwards. Main thread only.

    Children that were forked meanwhile (data loaders, pools) inherit the handler without the state behind it: in
    them the signal has its default effect.
    """
    owner = os.getpid()

    def own_process_only(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
            return
        handler(signum, frame)

    previous = {name: signal.signal(name, own_process_only) for name in STOP_SIGNALS}
    try:
        yield
    finally:
        for name, old in previous.items():
            signal.signal(name, old)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Within this block SIGTERM and SIGINT raise StopRequested wherever the main thread is."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise StopRequested(signal.Signals(signum).name)

    with handling(stop):
        yield


class StopFlag:
    """Within `with StopFlag() as stop:` the first SIGTERM or SIGINT only makes `stop.is_set()` true.

    The second one raises StopRequested. A signal may reach one rank only: ranks agree on the flag by a collective
    before they act on it. May be read from any thread.
    """

    def __init__(self) -> None:
        # A plain attribute: threading.Event takes a lock, which a handler must not wait for.
        self._set = False
        self._handling = handling(self._on_signal)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._set:
            raise StopRequested(signal.Signals(signum).name)
        self._set = True

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._set

    def __enter__(self) -> Self:
        self._handling.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handling.__exit__(None, None, None)
