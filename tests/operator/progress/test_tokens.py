"""Only the first worker of a job's current attempt reports, and the API server is asked no more than needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from finetune_operator.errors import Forbidden, Unavailable
from finetune_operator.names import ATTEMPT_LABEL, JOB_UID_LABEL, REPLICA_INDEX_LABEL
from finetune_operator.progress import tokens
from finetune_operator.progress.refusals import MayNotReport, TryAgain
from finetune_operator.progress.sender import Sender
from finetune_operator.progress.tokens import KNOWN_SECONDS, REVIEWS_AT_ONCE, UNKNOWN_SECONDS, TokenAuthorizer
from tests.operator.progress.fake_cluster import JOB_UID, PYTORCHJOB_UID, FakeCluster, worker

TOKEN = "t0ken-0f-w0rker-0"
JOB = ("team-a", "guard", JOB_UID)


class Setting:
    """A cluster with the first worker of job `guard`, and a reconciler that knows its attempt."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.pod = self.cluster.add_pod(worker(), TOKEN)
        self.attempts: dict[tuple[str, str, str], tuple[int, str]] = {JOB: (1, PYTORCHJOB_UID)}
        self.seconds = 0.0
        self.authorize = TokenAuthorizer(
            self.cluster,
            lambda *job: self.attempts.get(job),
            audience="finetune-operator",
            clock=lambda: self.seconds,
        )

    def ask(self, token: str = TOKEN) -> Sender | None:
        return asyncio.run(self.authorize(token))

    @property
    def reviews(self) -> int:
        return self.cluster.requests.count("review_token")


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_the_first_worker_of_the_current_attempt_reports_for_its_job(setting: Setting) -> None:
    assert setting.ask() == Sender(*JOB, 1, PYTORCHJOB_UID, setting.pod["metadata"]["name"])


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
    setting.cluster.add_pod(impostor, "impostor")
    with pytest.raises(MayNotReport, match="first worker"):
        setting.ask("impostor")


def test_a_pod_dressed_up_as_one_of_another_namespace_reports_nothing(setting: Setting) -> None:
    setting.cluster.add_pod(worker(namespace="team-b"), "dressed-up")
    with pytest.raises(TryAgain):
        setting.ask("dressed-up")


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
        setting.ask("unknown")
    assert setting.reviews == 2
    setting.seconds = UNKNOWN_SECONDS
    setting.ask()
    setting.ask("unknown")
    assert setting.reviews == 3
    setting.seconds = KNOWN_SECONDS
    setting.cluster.reviews[TOKEN]["authenticated"] = False
    assert setting.ask() is None
    assert setting.reviews == 5 - 1


def test_many_reports_with_one_token_at_once_cost_one_review(setting: Setting) -> None:
    async def run() -> list[Sender | None]:
        setting.cluster.answers.clear()
        asking = [asyncio.create_task(setting.authorize(TOKEN)) for _ in range(20)]
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


def test_a_flood_of_bad_tokens_leaves_the_good_ones_remembered_and_asks_about_few_at_a_time(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED", 10)

    async def run() -> None:
        assert await setting.authorize(TOKEN) is not None
        setting.cluster.answers.clear()
        asking = [asyncio.create_task(setting.authorize(f"bad-{number}")) for number in range(100)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert setting.reviews == 1 + REVIEWS_AT_ONCE
        setting.cluster.answers.set()
        assert await asyncio.gather(*asking) == [None] * 100
        setting.cluster.requests.clear()
        assert await setting.authorize(TOKEN) is not None
        assert await setting.authorize("bad-99") is None
        assert setting.reviews == 0
        assert await setting.authorize("bad-0") is None
        assert setting.reviews == 1

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
        asking = asyncio.create_task(setting.authorize(TOKEN))
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
