"""Decides whose progress a token may report: the one of the job that the token's own pod is the first worker of.

The API server says whose a token is and what its pod belongs to, which is remembered for a minute. Whether that is
still the job's current attempt is asked for every report. The API server is asked only about what claims to be the
token of a pod that may report now, and by no address more than a few times that lead to nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Protocol

from finetune_operator.errors import ApiError
from finetune_operator.progress.claims import Claims, read_claims
from finetune_operator.progress.refusals import MayNotReport, TooOften, TryAgain
from finetune_operator.progress.sender import ONLY_PODS, Sender, read_sender, reviewed_pod
from finetune_operator.progress.turns import Turns
from finetune_operator.serving.budget import Budget

KNOWN_SECONDS = 60.0
"""How long the API server's word on a good token is remembered."""
UNKNOWN_SECONDS = 10.0
"""How long it is remembered that a token is none, or may not report."""
REMEMBERED = 8192
"""Good tokens that are remembered."""
REMEMBERED_BAD = 1024
"""Tokens that are none, or may not report, which are remembered."""
REVIEWS_AT_ONCE = 8
"""Tokens that the API server is asked about at the same time."""
REVIEWS_BURST = 32
"""Tokens of one address that it is asked about in a row without one report that is taken."""
REVIEWS_PER_SECOND = 0.5
"""Those that it is asked about for ever."""
REPORTS_BURST = 20
"""Reports of one job that are taken in a row."""
REPORTS_PER_SECOND = 1.0
"""Those that are taken for ever. Trainers send one every five seconds, and one with each change of phase."""

CurrentAttempt = Callable[[str, str, str], tuple[int, str] | None]
"""Namespace, name and uid of a FineTuneJob -> number of its current attempt and uid of that attempt's PyTorchJob; None:
not known. The namespace matters: in their own, people can give their pods the labels and owners of another's."""
ExpectsPod = Callable[[str, str], bool]
"""Namespace and name of a pod -> whether it may be the first worker of a job's current attempt."""

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


@dataclass
class _Review:
    """A question to the API server, for as long as somebody waits for its answer."""

    task: asyncio.Task[_Answer]
    waiting: int = 0


class TokenAuthorizer:
    """The `authorize` of `progress_app`.

    Args:
        client: the API server.
        current_attempt: what the reconciler knows of a job.
        audience: audience that the tokens must be for.
        expects_pod: what the reconciler knows of a pod; None when it is not asked.
        now: wall clock, UTC.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: TokenClient,
        current_attempt: CurrentAttempt,
        *,
        audience: str,
        expects_pod: ExpectsPod | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._current_attempt = current_attempt
        self._audience = audience
        self._expects_pod = expects_pod
        self._now = now
        self._clock = clock
        # Apart, so that no number of bad tokens pushes out a good one.
        self._good: OrderedDict[str, _Answer] = OrderedDict()
        self._bad: OrderedDict[str, _Answer] = OrderedDict()
        self._reviews: dict[str, _Review] = {}
        self._turns = Turns(REVIEWS_AT_ONCE)
        self._reviews_of_peer = Budget[str](REVIEWS_BURST, REVIEWS_PER_SECOND, clock=clock)
        self._reports_of_job = Budget[str](REPORTS_BURST, REPORTS_PER_SECOND, clock=clock)
        self._failing = False

    async def __call__(self, token: str, peer: str) -> Sender | None:
        """Who sends `token` from address `peer`; None when the API server does not know it.

        Raises:
            MayNotReport: it is genuine, but not of the first worker of a job's current attempt.
            TooOften: too many reports of this job, or too many tokens from this address that lead to nothing.
            TryAgain: the API server or the reconciler cannot tell yet.
        """
        claims = read_claims(token, self._audience, self._now())
        if claims is None:
            return None
        digest = sha256(token.encode(errors="replace")).hexdigest()
        answer = self._remembered(digest)
        is_new = answer is None
        if answer is None:
            answer = await self._ask(token, digest, claims, peer)
        if answer.refusal is not None:
            raise MayNotReport(answer.refusal)
        if answer.sender is not None:
            self._check_attempt(answer.sender)
            if not self._reports_of_job.take(answer.sender.job_uid):
                raise TooOften("This job reports too often; the newest report counts, so send one every few seconds.")
            if is_new:
                self._reviews_of_peer.give_back(peer)
        return answer.sender

    def _check_attempt(self, sender: Sender) -> None:
        current = self._current_attempt(sender.namespace, sender.job_name, sender.job_uid)
        if current is None:
            raise TryAgain("The operator has not looked at this job yet; try again.")
        if current != (sender.attempt, sender.pytorchjob_uid):
            raise MayNotReport(f"This pod does not belong to the job's current attempt, which is number {current[0]}.")

    def _remembered(self, digest: str) -> _Answer | None:
        for answers in (self._good, self._bad):
            answer = answers.get(digest)
            if answer is not None:
                if self._clock() < answer.until:
                    return answer
                del answers[digest]
        return None

    async def _ask(self, token: str, digest: str, claims: Claims, peer: str) -> _Answer:
        if claims.pod is None:
            raise MayNotReport(ONLY_PODS)
        if self._expects_pod is not None and not self._expects_pod(claims.namespace, claims.pod):
            raise TryAgain("No job waits for reports of this pod: it is not the first worker of a current attempt.")
        review = self._reviews.get(digest)
        if review is None:
            if not self._reviews_of_peer.take(peer):
                raise TooOften("Too many tokens from this address led to no report; try again later.")
            # A task of its own: a client that goes away takes nobody else's answer with it.
            review = self._reviews[digest] = _Review(asyncio.create_task(self._review(token, digest, claims, peer)))
        review.waiting += 1
        try:
            return await asyncio.shield(review.task)
        finally:
            review.waiting -= 1
            if not review.waiting:  # it has its answer, or nobody wants one any more
                del self._reviews[digest]
                review.task.cancel()

    async def _review(self, token: str, digest: str, claims: Claims, peer: str) -> _Answer:
        try:
            async with self._turns.turn(peer):
                asked_at = self._clock()
                sender, refusal = await self._sender(token)
        except ApiError as error:
            if not self._failing:
                _log.warning("Tokens of trainers cannot be checked, so jobs show no progress: %s.", error)
            self._failing = True
            raise TryAgain("The token cannot be checked now; try again.") from error
        self._failing = False
        if sender is None:
            return _remember(self._bad, REMEMBERED_BAD, digest, _Answer(None, refusal, asked_at + UNKNOWN_SECONDS))
        valid_seconds = claims.expires - self._now().timestamp()
        known = _Answer(sender, None, asked_at + min(KNOWN_SECONDS, max(0.0, valid_seconds)))
        return _remember(self._good, REMEMBERED, digest, known)

    async def _sender(self, token: str) -> tuple[Sender | None, str | None]:
        review = await self._client.review_token(token, self._audience)
        if not review.get("authenticated") or self._audience not in (review.get("audiences") or []):
            return None, None
        try:
            identity = reviewed_pod(review)
            return read_sender(await self._client.get_pod(identity.namespace, identity.name), identity), None
        except MayNotReport as error:
            return None, str(error)


def _remember(answers: OrderedDict[str, _Answer], limit: int, digest: str, answer: _Answer) -> _Answer:
    answers[digest] = answer
    if len(answers) > limit:
        answers.popitem(last=False)
    return answer
