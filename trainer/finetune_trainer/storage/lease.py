"""Keeps two runs from writing to one place of an object store, where no file can be locked.

The holder writes its name there again and again. Who finds a name that was not written for a while takes its place.
How old it is the store's clock says, so that it does not matter what the machines think of the time.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

LEASE = ".finetune-lease.json"
VALID_SECONDS = 75.0
RENEW_SECONDS = 20.0
MARGIN_SECONDS = 15.0
"""So long before its end the holder itself counts on it no more: a request may be under way for a while."""
PATIENCE_SECONDS = VALID_SECONDS + 2 * RENEW_SECONDS
LOOK_SECONDS = 2.0
SETTLE_SECONDS = 0.5
"""Not every server decides between two that write at once. Who was last is known after this."""


@dataclass(frozen=True)
class Holder:
    """Who has a lease."""

    job: str
    host: str
    pid: int
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells it from all others."""

    def __str__(self) -> str:
        return f"job {self.job}, process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Seen:
    """What a slot held when it was read."""

    data: bytes
    etag: str
    written: datetime | None
    now: datetime | None
    """By the same clock as `written`, the store's; either is None where it does not say."""

    @property
    def age_seconds(self) -> float | None:
        """Time since it was written, below 0 where the store's clock went backwards."""
        return (self.now - self.written).total_seconds() if self.now and self.written else None

    def holder(self) -> Holder | None:
        """Whose name is in it, or None when it is no lease's content."""
        try:
            content = json.loads(self.data)
            return Holder(str(content["job"]), str(content["host"]), int(content["pid"]), str(content["id"]))
        except (ValueError, KeyError, TypeError):
            return None


class Slot(Protocol):
    """An object that is replaced only by who knows its content."""

    uri: str

    def read(self) -> Seen | None:
        """What is there now."""

    def put(self, data: bytes, *, replacing: str | None) -> str | None:
        """Replace the content of that ETag (None: nothing); the new one's, or None when another is there."""

    def remove(self, etag: str) -> None:
        """Remove the content of that ETag."""


def awake_seconds() -> float:
    """Seconds that go on while the machine sleeps: a lease runs out meanwhile."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """The right to write to the place that `slot` belongs to.

    Args:
        slot: where holders write their names.
        place: the output's address, for messages.
        holder: this process.
        clock: seconds that never go backwards.
        pause: waits so many seconds.
        renewing: start a thread that renews it; else somebody calls `renew`.
    """

    def __init__(
        self,
        slot: Slot,
        place: str,
        holder: Holder,
        *,
        clock: Callable[[], float] = awake_seconds,
        pause: Callable[[float], None] = time.sleep,
        renewing: bool = True,
    ) -> None:
        self._slot, self._place, self._holder = slot, place, holder
        self._clock, self._pause, self._renewing = clock, pause, renewing
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._writes = 0
        self._etag: str | None = None
        self._renewed = 0.0
        self._taken: Seen | None = None

    @property
    def lost(self) -> bool:
        """Whether another process took it."""
        return self._taken is not None

    def take(self, say: Callable[[str], None]) -> None:
        """Take the lease, and wait for that of a holder who may be dead to run out, PATIENCE_SECONDS at most.

        Args:
            say: is told what is waited for.

        Raises:
            JobError: OutputConflict, its holder is alive; or the store's.
        """
        began, first, first_at = self._clock(), None, 0.0
        while True:
            now, seen = self._clock(), self._slot.read()
            if seen is not None and self._is_mine(seen):
                break
            if now - began > PATIENCE_SECONDS:
                raise self._unsure()
            if seen is not None and first is not None and seen.etag != first.etag:
                raise self._conflict(seen)
            if seen is None or self._ran_out(seen, now - first_at if first else 0.0):
                self._slot.put(self._content(), replacing=seen.etag if seen else None)
                # Read again: the answer may have been lost, or another may have written at the same time.
                first = None
                self._pause(SETTLE_SECONDS)
                continue
            if first is None:
                first, first_at = seen, now
                say(f"{self._place} was in use by {_name(seen)}, waiting until its lease ends{_end(seen)}.")
            self._pause(LOOK_SECONDS)
        self._etag, self._renewed = seen.etag, now
        if self._renewing:
            self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Refuse to go on without the lease.

        Raises:
            JobError: OutputConflict, another process took it; StorageUnavailable, it could not be renewed in time, and
                another may take it any moment.
        """
        if not self.lost and not self._is_sure():
            self.renew()
        if self._taken is not None:
            raise self._conflict(self._taken)
        if not self._is_sure():
            raise self._unsure()

    def renew(self) -> None:
        """Write the name again. A store that is away changes nothing yet."""
        with self._lock:
            if self.lost or self._ended.is_set():
                return
            now = self._clock()
            try:
                self._renew(now)
            except JobError:
                # What the store said tells nobody anything who does not write; who does is told by `check`.
                return

    def release(self) -> None:
        """Give it back, so that nobody has to wait; it ends by itself where that fails."""
        self._ended.set()
        with self._lock:
            etag, self._etag = self._etag, None
            if etag is None or self.lost:
                return
            try:
                self._slot.remove(etag)
            except JobError:
                return

    def _renew(self, now: float) -> None:
        etag = self._slot.put(self._content(), replacing=self._etag)
        if etag is None:
            seen = self._slot.read()
            if seen is not None and not self._is_mine(seen):
                self._taken = seen
                return
            # Nothing is there where somebody cleaned up; our own where only the answer was lost.
            etag = seen.etag if seen else self._slot.put(self._content(), replacing=None)
        if etag is not None:
            self._etag, self._renewed = etag, now

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and not self.lost:
            self.renew()

    def _is_sure(self) -> bool:
        return self._clock() - self._renewed < VALID_SECONDS - MARGIN_SECONDS

    def _is_mine(self, seen: Seen) -> bool:
        holder = seen.holder()
        return holder is not None and holder.id == self._holder.id

    def _ran_out(self, seen: Seen, watched_seconds: float) -> bool:
        age = seen.age_seconds
        # A clock of the store that went backwards must not make it last for ever.
        return (age is not None and age > VALID_SECONDS) or watched_seconds > VALID_SECONDS

    def _content(self) -> bytes:
        # Every write has another ETag: who watches sees that the holder lives.
        self._writes += 1
        return json.dumps({**asdict(self._holder), "writes": self._writes}).encode()

    def _unsure(self) -> JobError:
        return JobError(
            Reason.STORAGE_UNAVAILABLE,
            f"The lease {self._slot.uri} could not be taken or renewed: check the network and the store.",
        )

    def _conflict(self, seen: Seen) -> JobError:
        return JobError(
            Reason.OUTPUT_CONFLICT,
            f"Another run is using {self._place} right now ({_name(seen)}, its lease ends{_end(seen)} unless it is "
            "renewed): wait for it, or choose another output.",
        )


def _name(seen: Seen) -> str:
    return str(seen.holder() or "a process without a name")


def _end(seen: Seen) -> str:
    if seen.written is None:
        return f" after {VALID_SECONDS:.0f} s"
    return f" at {seen.written + timedelta(seconds=VALID_SECONDS):%H:%M:%S} UTC"
