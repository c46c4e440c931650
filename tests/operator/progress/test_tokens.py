"""Only the first worker of a job's current attempt reports, and the API server is asked no more than needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.errors import Forbidden, Unavailable
from finetune_operator.names import ATTEMPT_LABEL, JOB_UID_LABEL, REPLICA_INDEX_LABEL
from finetune_operator.progress import tokens
from finetune_operator.progress.refusals import MayNotReport, TooOften, TryAgain
from finetune_operator.progress.sender import Sender
from finetune_operator.progress.tokens import KNOWN_SECONDS, REVIEWS_AT_ONCE, UNKNOWN_SECONDS, TokenAuthorizer
from tests.operator.progress.fake_cluster import JOB_UID, PYTORCHJOB_UID, FakeCluster, token_of, worker

TOKEN = token_of(worker())
PEER, OTHER = "10.0.0.1", "10.0.0.2"
JOB = ("team-a", "guard", JOB_UID)


class Setting:
    """A cluster with the first worker of job `guard`, and a reconciler that knows its attempt."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.pod = worker()
        self.cluster.add_pod(self.pod)
        self.expected = {("team-a", self.pod["metadata"]["name"])}
        self.attempts: dict[tuple[str, str, str], tuple[int, str]] = {JOB: (1, PYTORCHJOB_UID)}
        self.seconds = 0.0
        self.authorize = TokenAuthorizer(
            self.cluster,
            lambda *job: self.attempts.get(job),
            audience="finetune-operator",
            expects_pod=lambda *pod: pod in self.expected,
            clock=lambda: self.seconds,
        )

    def ask(self, token: str = TOKEN, peer: str = PEER) -> Sender | None:
        return asyncio.run(self.authorize(token, peer))

    def add(self, pod: dict[str, Any]) -> str:
        """A pod that is expected to report, by its name at least."""
        self.expected.add((pod["metadata"]["namespace"], pod["metadata"]["name"]))
        return self.cluster.add_pod(pod)

    @property
    def reviews(self) -> int:
        return self.cluster.requests.count("review_token")


@pytest.fixture
def setting() -> Setting:
    return Setting()


def forged(number: int) -> str:
    """A token that claims to be the first worker's, and that the API server has never given to anybody."""
    return token_of(worker(), number=1000 + number)


def test_the_first_worker_of_the_current_attempt_reports_for_its_job(setting: Setting) -> None:
    assert setting.ask() == Sender(
        *JOB, 1, PYTORCHJOB_UID, setting.pod["metadata"]["name"], datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    )


def changed(**fields: Any) -> Callable[[Setting], None]:
    """The review's `fields` are these."""

    def change(setting: Setting) -> None:
        setting.cluster.reviews[TOKEN].update(fields)

    return change


def user(**fields: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        setting.cluster.reviews[TOKEN]["user"].update(fields)

    return change


def metadata(**fields: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        setting.pod["metadata"].update(fields)

    return change


def labels(**fields: str | None) -> Callable[[Setting], None]:
    names = {"uid": JOB_UID_LABEL, "attempt": ATTEMPT_LABEL, "index": REPLICA_INDEX_LABEL}

    def change(setting: Setting) -> None:
        for name, value in fields.items():
            setting.pod["metadata"]["labels"].pop(names[name])
            if value is not None:
                setting.pod["metadata"]["labels"][names[name]] = value

    return change


def owner(**fields: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        setting.pod["metadata"]["ownerReferences"][0].update(fields)

    return change


def gone(setting: Setting) -> None:
    setting.cluster.pods.clear()


@pytest.mark.parametrize(
    "change",
    [
        changed(authenticated=False, error="token has expired"),
        changed(authenticated=None),
        changed(audiences=["https://kubernetes.default.svc"]),
        changed(audiences=None),
    ],
)
def test_a_token_that_is_none_or_was_made_for_others_is_not_known(
    setting: Setting, change: Callable[[Setting], None]
) -> None:
    change(setting)
    assert setting.ask() is None
    assert "get_pod" not in setting.cluster.requests


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (user(extra=None), "Only a pod"),
        (user(extra={"authentication.kubernetes.io/pod-name": ["guard"]}), "Only a pod"),
        (user(username="admin"), "Only a pod"),
        (user(username="system:serviceaccount:team-a"), "Only a pod"),
        (user(username="system:serviceaccount:team-b:default"), "is gone"),
        (gone, "is gone"),
        (metadata(uid="of-a-pod-with-the-same-name"), "is gone"),
        (metadata(labels=None), "no FineTuneJob"),
        (labels(uid=None), "no FineTuneJob"),
        (labels(attempt=None), "no FineTuneJob"),
        (labels(attempt="first"), "no FineTuneJob"),
        (labels(attempt="²"), "no FineTuneJob"),
        (metadata(ownerReferences=None), "no FineTuneJob"),
        (owner(controller=False), "no FineTuneJob"),
        (owner(kind="Job"), "no FineTuneJob"),
        (owner(apiVersion="example.com/v1"), "no FineTuneJob"),
        (owner(uid="of-an-earlier-pytorchjob"), "current attempt"),
        (owner(name="another"), "first worker"),
        (labels(index="1"), "first worker"),
        (labels(index=None), "first worker"),
        (labels(attempt="2"), "current attempt"),
    ],
)
def test_a_genuine_token_that_may_not_report_is_told_why(
    setting: Setting, change: Callable[[Setting], None], said: str
) -> None:
    change(setting)
    with pytest.raises(MayNotReport, match=said):
        setting.ask()


def test_a_pod_that_calls_itself_the_first_worker_is_told_from_the_first_worker(setting: Setting) -> None:
    impostor = worker(1)
    impostor["metadata"]["labels"][REPLICA_INDEX_LABEL] = "0"
    token = setting.add(impostor)
    with pytest.raises(MayNotReport, match="first worker"):
        setting.ask(token)


def test_a_pod_dressed_up_as_one_of_another_namespace_reports_nothing(setting: Setting) -> None:
    token = setting.add(worker(namespace="team-b"))
    with pytest.raises(TryAgain):
        setting.ask(token)


def test_the_current_attempt_is_asked_for_every_report(setting: Setting) -> None:
    assert setting.ask() is not None
    setting.attempts[JOB] = (2, "uid-of-the-next-pytorchjob")
    with pytest.raises(MayNotReport, match="number 2"):
        setting.ask()
    assert setting.reviews == 1


def test_a_job_that_the_operator_has_not_looked_at_yet_is_asked_to_try_again(setting: Setting) -> None:
    setting.attempts.clear()
    with pytest.raises(TryAgain):
        setting.ask()
    setting.attempts[JOB] = (1, PYTORCHJOB_UID)
    assert setting.ask() is not None
    assert setting.reviews == 1


def test_answers_are_remembered_for_their_time_and_no_longer(setting: Setting) -> None:
    for _ in range(3):
        setting.ask()
        setting.ask(forged(0))
    assert setting.reviews == 2
    setting.seconds = UNKNOWN_SECONDS
    setting.ask()
    setting.ask(forged(0))
    assert setting.reviews == 3
    setting.seconds = KNOWN_SECONDS
    setting.cluster.reviews[TOKEN]["authenticated"] = False
    assert setting.ask() is None
    assert setting.reviews == 5 - 1


async def turns_of_the_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_many_reports_with_one_token_at_once_cost_one_review(setting: Setting) -> None:
    async def run() -> list[Sender | None]:
        setting.cluster.answers.clear()
        asking = [asyncio.create_task(setting.authorize(TOKEN, PEER)) for _ in range(20)]
        await asyncio.sleep(0)
        # Whoever came first goes away; the others still get their answer.
        asking.pop(0).cancel()
        await asyncio.sleep(0)
        setting.cluster.answers.set()
        return await asyncio.gather(*asking)

    senders = asyncio.run(run())
    assert len(senders) == 19
    assert None not in senders
    assert setting.reviews == 1


@pytest.mark.parametrize(
    "token",
    [
        pytest.param("garbage", id="no token"),
        pytest.param(token_of(worker(), aud=["https://kubernetes.default.svc"]), id="for another audience"),
        pytest.param(token_of(worker(), exp=1_000_000_000), id="expired"),
        pytest.param(token_of(worker(), sub="system:serviceaccount:team-b:default"), id="of two namespaces"),
    ],
)
def test_what_cannot_be_a_token_for_us_is_not_known_and_costs_no_review(setting: Setting, token: str) -> None:
    assert setting.ask(token) is None
    assert setting.cluster.requests == []


@pytest.mark.parametrize(
    ("token", "error"),
    [
        pytest.param(token_of(None), MayNotReport, id="of no pod"),
        pytest.param(token_of(worker(1)), TryAgain, id="of the second worker"),
        pytest.param(token_of(worker(attempt=2)), TryAgain, id="of another attempt"),
        pytest.param(token_of(worker(namespace="team-b")), TryAgain, id="of another namespace"),
    ],
)
def test_a_token_of_a_pod_that_nobody_waits_for_costs_no_review(
    setting: Setting, token: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        setting.ask(token)
    assert setting.cluster.requests == []


def test_a_token_is_remembered_no_longer_than_it_is_valid(setting: Setting) -> None:
    ends_soon = token_of(worker(), exp=datetime.now(UTC).timestamp() + 30)
    setting.cluster.reviews[ends_soon] = setting.cluster.reviews[TOKEN]
    assert setting.ask(ends_soon) is not None
    setting.seconds = 30
    setting.cluster.reviews.clear()
    assert setting.ask(ends_soon) is None


def test_tokens_that_lead_to_nothing_are_reviewed_a_few_times_and_then_rarely(setting: Setting) -> None:
    def reviewed(tries: int) -> int:
        before = setting.reviews
        for _ in range(tries):
            with suppress(TooOften):
                assert setting.ask(forged(setting.reviews + 5000)) is None
        return setting.reviews - before

    assert reviewed(500) == tokens.REVIEWS_BURST
    setting.seconds += 20
    assert reviewed(500) == 20 * tokens.REVIEWS_PER_SECOND
    with pytest.raises(TooOften):
        setting.ask(forged(0))
    assert setting.ask(TOKEN, OTHER) is not None


def test_any_number_of_trainers_behind_one_address_report(setting: Setting) -> None:
    for number in range(10 * tokens.REVIEWS_BURST):
        token = token_of(worker(), number=number)
        setting.cluster.reviews[token] = setting.cluster.reviews[TOKEN]
        setting.seconds += 1 / tokens.REPORTS_PER_SECOND
        assert setting.ask(token) is not None


def test_a_job_that_reports_without_pause_is_told_to_wait_and_others_are_not(setting: Setting) -> None:
    other = worker(job="other", uid="6f0c1f6e-8d0f-4c55-a0f0-51a1b3f0c0de")
    token = setting.add(other)
    setting.attempts["team-a", "other", "6f0c1f6e-8d0f-4c55-a0f0-51a1b3f0c0de"] = (1, PYTORCHJOB_UID)
    for _ in range(tokens.REPORTS_BURST):
        assert setting.ask() is not None
    with pytest.raises(TooOften):
        setting.ask()
    assert setting.ask(token) is not None
    setting.seconds += 1 / tokens.REPORTS_PER_SECOND
    assert setting.ask() is not None


def test_a_flood_of_bad_tokens_leaves_the_good_ones_remembered_and_asks_about_few_at_a_time(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED_BAD", 10)
    monkeypatch.setattr(tokens, "REMEMBERED", 10)
    setting = Setting()

    async def run() -> None:
        assert await setting.authorize(TOKEN, PEER) is not None
        setting.cluster.answers.clear()
        asking = [asyncio.create_task(setting.authorize(forged(number), f"peer-{number}")) for number in range(100)]
        await turns_of_the_loop()
        assert setting.reviews == 1 + REVIEWS_AT_ONCE
        setting.cluster.answers.set()
        assert await asyncio.gather(*asking) == [None] * 100
        setting.cluster.requests.clear()
        assert await setting.authorize(TOKEN, PEER) is not None
        assert await setting.authorize(forged(99), PEER) is None
        assert setting.reviews == 0
        assert await setting.authorize(forged(0), PEER) is None
        assert setting.reviews == 1

    asyncio.run(run())


def test_an_address_with_many_tokens_does_not_make_others_wait_for_all_of_them(setting: Setting) -> None:
    async def run() -> None:
        setting.cluster.answers.clear()
        flood = [asyncio.create_task(setting.authorize(forged(number), OTHER)) for number in range(30)]
        await turns_of_the_loop()
        honest = asyncio.create_task(setting.authorize(TOKEN, PEER))
        await turns_of_the_loop()
        setting.cluster.answers.set()
        assert await honest is not None
        assert await asyncio.gather(*flood) == [None] * 30
        # Before it: those that were asked about already, and one whose turn it was.
        assert setting.cluster.reviewed.index(TOKEN) <= REVIEWS_AT_ONCE + 1

    asyncio.run(run())


def test_a_review_ends_with_the_last_client_that_waits_for_it(setting: Setting) -> None:
    async def run() -> None:
        setting.cluster.answers.clear()
        for number in range(REVIEWS_AT_ONCE + 5):
            asking = asyncio.create_task(setting.authorize(forged(number), PEER))
            await turns_of_the_loop()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await turns_of_the_loop()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        # Nothing is held by those that went away: the next one is reviewed at once.
        setting.cluster.answers.set()
        assert await setting.authorize(TOKEN, PEER) is not None

    asyncio.run(run())


def test_a_token_whose_only_client_went_away_at_once_can_be_sent_again(setting: Setting) -> None:
    async def run() -> None:
        asking = asyncio.create_task(setting.authorize(TOKEN, PEER))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await setting.authorize(TOKEN, PEER) is not None

    asyncio.run(run())


@pytest.mark.parametrize(
    "error", [Unavailable(None, "", "no answer"), Forbidden(403, "Forbidden", "tokenreviews is forbidden")]
)
def test_an_api_server_that_cannot_be_asked_is_said_once_and_remembered_never(
    setting: Setting, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    setting.cluster.error = error  # type: ignore[assignment]
    for _ in range(3):
        with pytest.raises(TryAgain):
            setting.ask()
    setting.cluster.error = None
    assert setting.ask() is not None
    assert [record.getMessage() for record in caplog.records] == [
        f"Tokens of trainers cannot be checked, so jobs show no progress: {error}."
    ]


def test_an_answer_that_nobody_waits_for_any_more_is_not_complained_about(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        setting.cluster.answers.clear()
        asking = asyncio.create_task(setting.authorize(TOKEN, PEER))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.sleep(0)
        setting.cluster.refused["get_pod"] = Unavailable(None, "", "no answer")
        setting.cluster.answers.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(run())
    assert "never retrieved" not in caplog.text
    assert TOKEN not in caplog.text
