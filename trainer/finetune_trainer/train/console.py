"""What a person sees of a run who reads the worker's output: plain lines, in a pod's log as on a laptop.

`finetune run` draws a progress bar from the posted progress, so it sets FINETUNE_CONSOLE=quiet, and the lines that the
bar would only repeat are left out.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

CONSOLE_ENV = "FINETUNE_CONSOLE"
"""`quiet` leaves out the lines that a progress bar shows: training steps and data preparation."""


def human_duration(seconds: float) -> str:
    """A length of time in its two largest units: `45 s`, `3 min 20 s`, `2 h 05 min`, `1 d 03 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


class Console:
    """Writes one line per event to `stream`.

    Args:
        stream: where to; each line is flushed, since a log that lags behind is of no use in a crash.
        quiet: leave out training steps and data preparation.
        clock: monotonic seconds, to keep lines about one preparation apart.
        preparation_seconds: least time between two lines about the same preparation (seconds).
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        preparation_seconds: float = 5.0,
    ) -> None:
        self._stream = stream
        self._quiet = quiet
        self._clock = clock
        self._preparation_seconds = preparation_seconds
        self._preparing: str | None = None
        self._last_preparation = -math.inf

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], stream: TextIO | None = None) -> Console:
        """The console that FINETUNE_CONSOLE asks for, on standard output unless told otherwise."""
        return cls(stream or sys.stdout, quiet=environ.get(CONSOLE_ENV) == "quiet")

    def phase(self, text: str) -> None:
        """A new part of the run begins: `Loading the model …`."""
        self._line(text)

    def warning(self, text: str) -> None:
        """Something the person should know although the run goes on."""
        self._line(f"warning: {text}")

    def preparing(self, what: str, done: int, total: int | None) -> None:
        """Data preparation advanced to `done` of `total` rows; `total` is None while it is unknown.

        The first and the last line of each `what` are always written, those between at most every few seconds.
        """
        if self._quiet:
            return
        now = self._clock()
        ended = total is not None and done >= total
        if what == self._preparing and not ended and now - self._last_preparation < self._preparation_seconds:
            return
        self._preparing, self._last_preparation = (None if ended else what), now
        share = f" of {total:,} rows  {_percent(done, total)}" if total else " rows"
        self._line(f"{what}: {done:,}{share}")

    def step(
        self,
        step: int,
        total_steps: int,
        *,
        loss: float | None = None,
        learning_rate: float | None = None,
        tokens_per_second: float | None = None,
        remaining_seconds: float | None = None,
    ) -> None:
        """One logged training step; a figure that is None is left out."""
        if self._quiet:
            return
        self._fields(
            f"step {step}/{total_steps}",
            None if loss is None else f"loss {loss:.3f}",
            None if learning_rate is None else f"lr {learning_rate:.1e}",
            None if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s",
            None if remaining_seconds is None else f"{human_duration(remaining_seconds)} left",
        )

    def evaluation(
        self,
        step: int,
        total_steps: int,
        *,
        loss: float | None,
        perplexity: float | None = None,
        token_accuracy: float | None = None,
    ) -> None:
        """The figures of one evaluation; `token_accuracy` is a share from 0 to 1."""
        self._fields(
            f"evaluation at step {step}/{total_steps}",
            "loss not measured" if loss is None else f"loss {loss:.3f}",
            None if perplexity is None else f"perplexity {perplexity:.2f}",
            None if token_accuracy is None else f"token accuracy {token_accuracy:.1%}",
        )

    def _fields(self, *fields: str | None) -> None:
        self._line("  ".join(field for field in fields if field is not None))

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _percent(done: int, total: int) -> str:
    return f"{min(100, done * 100 // total)} %"
