"""Decides whose progress a token may report: the one of the job that the token's own pod is the first worker of.

The API server says whose a token is and what its pod belongs to, which is remembered for a minute. Whether that is
still the job's current attempt is asked for every report.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

from finetune_operator.errors import ApiError
from finetune_operator.progress.refusals import MayNotReport, TryAgain
from finetune_operator.progress.sender import Sender, read_sender, reviewed_pod

KNOWN_SECONDS = 60.0
"""How long the API server's word on a good token is remembered."""
UNKNOWN_SECONDS = 10.0
"""How long it is remembered that a token is none, or may not report."""
REMEMBERED = 8192
"""Good tokens that are remembered, and as many bad ones."""
REVIEWS_AT_ONCE = 8
"""Tokens that the API server is asked about at the same time."""

CurrentAttempt = Callable[[str, str, str], tuple[int, str] | None]
"""Namespace, name and uid of a FineTuneJob -> number of its current attempt and uid of that attempt's PyTorchJob; None:
not known. The namespace matters: in their own, people can give their pods the labels and owners of another's."""

_log = logging.getLogger(__name__)


class TokenClient(Protocol):
    """What is needed of the API server. Objects are raw; failures are finetune_operator.errors.ApiError."""

    async def review_token(self, token: str, audience: str) -> dict[str, Any]:
        """`status` of the TokenReview of `token` for `audience`."""

    async def get_pod(self, namespace: str, name: str) -> dict[str, Any] | None:
        """The pod as it is now, or None."""


@dataclass(frozen=True)
class _Answer:
    sender: Sender | None
    """None when nobody knows the token, or when it may not report."""
    refusal: str | None
    """Why a genuine token may not report."""
    until: float


class TokenAuthorizer:
    """The `authorize` of `progress_app`.

    Args:
        client: the API server.
        current_attempt: what the reconciler knows of a job.
        audience: audience that the tokens must be for.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: TokenClient,
        current_attempt: CurrentAttempt,
        *,
        audience: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._current_attempt = current_attempt
        self._audience = audience
        self._clock = clock
        # Apart, so that no number of bad tokens pushes out a good one.
        self._good: OrderedDict[str, _Answer] = OrderedDict()
        self._bad: OrderedDict[str, _Answer] = OrderedDict()
        self._asked: dict[str, asyncio.Task[_Answer]] = {}
        self._free = asyncio.Semaphore(REVIEWS_AT_ONCE)
        self._failing = False

    async def __call__(self, token: str) -> Sender | None:
        """Who sends `token`; None when the API server does not know it.

        Raises:
            MayNotReport: it is genuine, but not of the first worker of a job's current attempt.
            TryAgain: the API server or the reconciler cannot tell yet.
        """
        answer = await self._answer(token)
        if answer.refusal is not None:
            raise MayNotReport(answer.refusal)
        if answer.sender is not None:
            self._check_attempt(answer.sender)
        return answer.sender

    def _check_attempt(self, sender: Sender) -> None:
        current = self._current_attempt(sender.namespace, sender.job_name, sender.job_uid)
        if current is None:
            raise TryAgain("The operator has not looked at this job yet; try again.")
        if current != (sender.attempt, sender.pytorchjob_uid):
            raise MayNotReport(f"This pod does not belong to the job's current attempt, which is number {current[0]}.")

    async def _answer(self, token: str) -> _Answer:
        digest = sha256(token.encode(errors="replace")).hexdigest()
        for answers in (self._good, self._bad):
            answer = answers.get(digest)
            if answer is not None:
                if self._clock() < answer.until:
                    return answer
                del answers[digest]
        task = self._asked.get(digest)
        if task is None:
            # A task of its own: a client that goes away takes nobody else's answer with it.
            task = self._asked[digest] = asyncio.create_task(self._ask(token, digest))
            task.add_done_callback(_retrieve)
        return await asyncio.shield(task)

    async def _ask(self, token: str, digest: str) -> _Answer:
        try:
            async with self._free:
                asked_at = self._clock()
                sender, refusal = await self._review(token)
        except ApiError as error:
            if not self._failing:
                _log.warning("Tokens of trainers cannot be checked, so jobs show no progress: %s.", error)
            self._failing = True
            raise TryAgain("The token cannot be checked now; try again.") from error
        finally:
            del self._asked[digest]
        self._failing = False
        answers, seconds = (self._bad, UNKNOWN_SECONDS) if sender is None else (self._good, KNOWN_SECONDS)
        answer = answers[digest] = _Answer(sender, refusal, asked_at + seconds)
        if len(answers) > REMEMBERED:
            answers.popitem(last=False)
        return answer

    async def _review(self, token: str) -> tuple[Sender | None, str | None]:
        review = await self._client.review_token(token, self._audience)
        if not review.get("authenticated") or self._audience not in (review.get("audiences") or []):
            return None, None
        try:
            identity = reviewed_pod(review)
            return read_sender(await self._client.get_pod(identity.namespace, identity.name), identity), None
        except MayNotReport as error:
            return None, str(error)


def _retrieve(task: asyncio.Task[_Answer]) -> None:
    """Nobody may be waiting any more; asyncio would then print the exception, and with it perhaps the token."""
    if not task.cancelled():
        task.exception()
