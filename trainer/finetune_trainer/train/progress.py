"""Tells the operator, or `finetune run`, how far this run is: posts in the protocol of transformers' KubeflowCallback.

That callback is not used since it posts from the training thread and takes a resumed run for a fast one when it
computes the time left. Here a daemon thread posts, and nothing that goes wrong there reaches the training.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Self

import httpx

from finetune_api.outcome import ProgressReport, TrainerStatus
from finetune_trainer.train.metrics_log import utc_now
from finetune_trainer.train.progress_status import Phase, Progress, percent_done, trainer_status

SERVER_URL_ENV = "KUBEFLOW_TRAINER_SERVER_URL"
"""Address that reports are posted to; without it nothing is posted."""
TOKEN_PATH_ENV = "KUBEFLOW_TRAINER_SERVER_TOKEN"
"""File with the bearer token. It is read before every post, since the kubelet replaces it while the pod runs."""
CA_CERT_ENV = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
"""File with the certificates that the server is trusted by; without it the system's are used."""

POST_TIMEOUT_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """Where reports go and what proves who sends them."""

    url: str
    token_path: Path | None
    ca_cert_path: Path | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self | None:
        """The endpoint that the KUBEFLOW_TRAINER_SERVER_* variables name, or None when there is none."""
        url = environ.get(SERVER_URL_ENV)
        if not url:
            return None
        token, ca_cert = environ.get(TOKEN_PATH_ENV), environ.get(CA_CERT_ENV)
        return cls(url, Path(token) if token else None, Path(ca_cert) if ca_cert else None)

    def post(self, status: TrainerStatus) -> None:
        """Send one report.

        Raises:
            OSError: the token or certificate file cannot be read.
            ValueError: no token file is named, or the files hold nothing usable.
            httpx.HTTPError, httpx.InvalidURL: no answer, or one other than success.
        """
        if self.token_path is None:
            raise ValueError(f"{TOKEN_PATH_ENV} names no token file")
        token = self.token_path.read_text(encoding="ascii").strip()
        context = ssl.create_default_context(cafile=self.ca_cert_path) if self.url.startswith("https:") else False
        answer = httpx.post(
            self.url,
            content=ProgressReport(trainer_status=status).model_dump_json(exclude_none=True).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            verify=context,
            timeout=POST_TIMEOUT_SECONDS,
            # The endpoint is in the cluster or on this machine: a proxy meant for the internet must not see the token.
            trust_env=False,
        )
        answer.raise_for_status()


@dataclass(frozen=True)
class _Report:
    progress: Progress
    at: datetime


class ProgressReporter:
    """Posts the newest progress from a daemon thread; no method blocks or raises because of the network.

    Start of the run, a change of phase and the end are posted as soon as the previous post is done. What comes between
    is posted at most every `interval_seconds`, and only the newest of it.

    Args:
        endpoint: where to; None makes every method do nothing.
        interval_seconds: least time between two ordinary posts (seconds).
        end_seconds: how long `finish` may wait for the last posts (seconds).
        clock: monotonic seconds.
        now: wall clock, for the report's own time.
    """

    def __init__(
        self,
        endpoint: Endpoint | None,
        *,
        interval_seconds: float = 5.0,
        end_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._endpoint = endpoint
        self._interval_seconds = interval_seconds
        self._end_seconds = end_seconds
        self._clock = clock
        self._now = now
        self._wake = threading.Condition()
        self._milestones: deque[_Report] = deque()
        self._newest: _Report | None = None
        self._closed = False
        self._failing = False
        self._last = Progress(phase=Phase.PREPARING, percent=0)
        self._thread: threading.Thread | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """A reporter to the endpoint that the environment names, if any."""
        return cls(Endpoint.from_environment(environ))

    def start(self) -> None:
        """Begin: nothing is prepared yet."""
        if self._endpoint is None or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, args=(self._endpoint,), name="progress", daemon=True)
        self._thread.start()
        self._offer(self._last, milestone=True)

    def preparing(self, done: int, total: int | None) -> None:
        """Data preparation advanced to `done` of `total` rows."""
        self.update(Progress(phase=Phase.PREPARING, percent=percent_done(done, total)))

    def update(self, progress: Progress) -> None:
        """The run advanced to `progress`."""
        changed = progress.phase is not self._last.phase
        self._last = progress
        self._offer(progress, milestone=changed)

    def publish(self) -> None:
        """Training is over, the adapter is about to be published; the figures stay as they were."""
        self.update(replace(self._last, phase=Phase.PUBLISHING, percent=99, remaining_seconds=None))

    def finish(self) -> None:
        """The run succeeded: post 100 percent, then close. Waits for the post, but never longer than `end_seconds`."""
        self._last = replace(self._last, percent=100, remaining_seconds=0)
        self._offer(self._last, milestone=True)
        self.close()

    def close(self) -> None:
        """Send what is due and stop; call this instead of `finish` when the run failed."""
        with self._wake:
            self._closed = True
            self._newest = None
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(self._end_seconds)

    def _offer(self, progress: Progress, *, milestone: bool) -> None:
        if self._thread is None:
            return
        report = _Report(progress, self._now())
        with self._wake:
            if self._closed:
                return
            if milestone:
                self._milestones.append(report)
                self._newest = None
            else:
                self._newest = report
            self._wake.notify()

    def _run(self, endpoint: Endpoint) -> None:
        last_post = self._clock()
        while (report := self._next(last_post)) is not None:
            last_post = self._clock()
            try:
                endpoint.post(trainer_status(report.progress, report.at))
                self._failing = False
            except Exception as error:  # whatever it is, progress is never worth a training run
                if not self._failing:
                    _log.warning("Progress cannot be reported (%s); training goes on.", _cause(error))
                self._failing = True

    def _next(self, last_post: float) -> _Report | None:
        """Wait for the next report that is due; None when closed and everything due was taken."""
        with self._wake:
            while True:
                if self._milestones:
                    return self._milestones.popleft()
                if self._closed:
                    return None
                wait_seconds: float | None = None
                if self._newest is not None:
                    wait_seconds = last_post + self._interval_seconds - self._clock()
                    if wait_seconds <= 0:
                        report, self._newest = self._newest, None
                        return report
                self._wake.wait(wait_seconds)


def _cause(error: Exception) -> str:
    """`error` in a few words; its own only where they cannot quote the request and with it the token."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"the server answered {error.response.status_code}"
    if isinstance(error, (OSError, httpx.ConnectError)) or type(error) is ValueError:
        return str(error)
    return type(error).__name__
