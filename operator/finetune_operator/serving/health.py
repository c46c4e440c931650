"""Says whether the operator still sees the cluster: a process that runs but watches nothing must be restarted.

Proof of that is a full resync that succeeded lately and found nothing that a watch had kept to itself, since a cluster
in which nothing happens sends no events either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from aiohttp import web

LATE_PERIODS = 3
"""Resync periods without a successful resync after which something is wrong."""


Watch = tuple[str, str | None]
"""What is watched: a kind, and a namespace or None for all."""


class Heartbeat:
    """What the watches and the resyncs have shown lately.

    Args:
        resync_seconds: time between two resyncs (seconds).
        clock: monotonic seconds.
    """

    def __init__(self, resync_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_seconds = LATE_PERIODS * resync_seconds
        self._clock = clock
        self._since = clock()
        """When the last resync succeeded, or the process began."""
        self._resynced = False
        self._suspects: set[Watch] = set()
        """Watches of which a resync found an unannounced change, and no event came since."""
        self._silent: set[Watch] = set()
        """Watches of which that is true of two resyncs."""

    def event(self, kind: str, namespace: str) -> None:
        """The watch of `kind` told of a change in a namespace, so it works, be it that one's own or that of all."""
        if self._suspects or self._silent:
            works = {(kind, namespace), (kind, None)}
            self._suspects -= works
            self._silent -= works

    def resynced(self, missed: Mapping[Watch, int]) -> None:
        """A full resync succeeded.

        Args:
            missed: by watch, number of objects that it found changed, new or gone without an event having told.
                A few are normal, since an event may be on its way: it then comes before the next resync.
        """
        now_missed = {watch for watch, count in missed.items() if count}
        # However long after the first: a watch that works tells of every change sooner or later.
        self._silent |= self._suspects & now_missed
        self._suspects |= now_missed
        self._since = self._clock()
        self._resynced = True

    @property
    def ready(self) -> bool:
        """Whether every job has been looked at once."""
        return self._resynced

    def problem(self) -> str | None:
        """What is wrong, in one sentence; None while nothing is."""
        if self._silent:
            watches = " and ".join(sorted(kind + (f" in {place}" if place else "") for kind, place in self._silent))
            return f"The watch of {watches} is silent: two resyncs found changes, and no event told of any."
        late_seconds = self._clock() - self._since
        if late_seconds > self._limit_seconds:
            return f"No full resync succeeded for {late_seconds:.0f} s; the API server may be out of reach."
        return None


def health_app(heartbeat: Heartbeat, listening: Callable[[], bool]) -> web.Application:
    """GET /healthz for the liveness probe and /readyz for the readiness probe: 200, or 500 with a sentence.

    Args:
        heartbeat: what the operator has seen.
        listening: whether every other port is open.
    """

    async def healthz(_: web.Request) -> web.Response:
        return _answer(heartbeat.problem())

    async def readyz(_: web.Request) -> web.Response:
        if not heartbeat.ready:
            return _answer("The first look at all jobs is not done yet.")
        return _answer(None if listening() else "Not every port is open yet.")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


def _answer(problem: str | None) -> web.Response:
    return web.Response(text=f"{problem or 'ok'}\n", status=500 if problem else 200)
