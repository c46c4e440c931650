"""The real progress server on a thread of its own, for tests of what posts to it."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from finetune_api.outcome import TrainerStatus
from finetune_operator.progress.app import progress_app
from finetune_operator.serving.thread import listening_in_thread

WAIT_SECONDS = 60
"""A safety net against hanging: far above what any post needs."""


@dataclass
class Receiver:
    """Keeps every report. `tokens` are those that it knows; `answers` are set while it may answer."""

    url: str = ""
    tokens: set[str] = field(default_factory=lambda: {"right"})
    answers: threading.Event = field(default_factory=threading.Event)
    reports: list[TrainerStatus] = field(default_factory=list)
    posts: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    async def authorize(self, token: str) -> str | None:
        """The token itself as the key."""
        await asyncio.to_thread(self.answers.wait)
        known = token in self.tokens
        with self._changed:
            self.posts += 1
            self._changed.notify_all()
        return token if known else None

    def deliver(self, key: str, status: TrainerStatus) -> None:
        """Keep the report."""
        assert key in self.tokens
        with self._changed:
            self.reports.append(status)
            self._changed.notify_all()

    def wait_for_reports(self, count: int) -> list[TrainerStatus]:
        """The reports, as soon as there are `count`."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.reports) >= count, WAIT_SECONDS)
            return list(self.reports)

    def wait_for_posts(self, count: int) -> None:
        """Wait until `count` posts came in, wanted or not."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.posts >= count, WAIT_SECONDS)


@contextmanager
def run_receiver(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """A receiver on a free port of the loopback interface."""
    receiver = Receiver()
    receiver.answers.set()
    app = progress_app(receiver.authorize, receiver.deliver, authorize_timeout_seconds=3600)
    with listening_in_thread(app, "127.0.0.1", 0, tls=tls) as port:
        receiver.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/status"
        try:
            yield receiver
        finally:
            receiver.answers.set()
