"""`python skewed_operator.py SECONDS`: the operator on a machine whose clock is wrong by that, as the tests run it."""

from __future__ import annotations

import datetime as dt
import sys
import time


def skew(seconds: float) -> None:
    """Make the wall clock wrong for everything that is imported from now on. Monotonic clocks are never wrong."""

    class Skewed(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Skewed:
            return super().now(tz) + dt.timedelta(seconds=seconds)

    right = time.time
    dt.datetime = Skewed  # type: ignore[misc]  # that is the point
    time.time = lambda: right() + seconds


if __name__ == "__main__":
    skew(float(sys.argv[1]))
    from finetune_operator.__main__ import main

    sys.exit(main())
