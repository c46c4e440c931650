"""The probes fail when the operator is blind, and a cluster in which little happens is no reason to."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from finetune_operator.serving.health import LATE_PERIODS, Heartbeat, health_app
from finetune_operator.serving.port import listening

PERIOD = 300.0


class Setting:
    def __init__(self) -> None:
        self.seconds = 1000.0
        self.heartbeat = Heartbeat(PERIOD, clock=lambda: self.seconds)

    def resync(self, **missed: int) -> str | None:
        """A period passes and a resync finds this; what is wrong now."""
        self.seconds += PERIOD
        self.heartbeat.resynced({(kind, None): count for kind, count in missed.items()})
        return self.heartbeat.problem()


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_a_cluster_in_which_nothing_happens_is_healthy(setting: Setting) -> None:
    assert [setting.resync() for _ in range(10)] == [None] * 10


def test_resyncs_that_fail_for_three_periods_are_a_problem_until_one_succeeds(setting: Setting) -> None:
    setting.resync()
    setting.seconds += LATE_PERIODS * PERIOD
    assert setting.heartbeat.problem() is None
    setting.seconds += 1
    setting.heartbeat.event("jobs", "team")
    assert setting.heartbeat.problem() == ("No full resync succeeded for 901 s; the API server may be out of reach.")
    assert setting.resync() is None


def test_an_operator_that_never_gets_to_its_first_resync_has_a_problem(setting: Setting) -> None:
    setting.seconds += LATE_PERIODS * PERIOD + 1
    assert setting.heartbeat.problem() is not None


def test_a_watch_that_tells_nothing_of_two_changes_is_a_problem(setting: Setting) -> None:
    assert setting.resync(jobs=1, pods=0) is None
    assert setting.resync(jobs=2, pods=0) == (
        "The watch of jobs is silent: two resyncs found changes, and no event told of any."
    )
    setting.heartbeat.event("pods", "team")
    assert setting.resync(jobs=1) is not None


def test_a_watch_that_speaks_again_is_no_problem_any_more(setting: Setting) -> None:
    setting.resync(jobs=1)
    assert setting.resync(jobs=1) is not None
    setting.heartbeat.event("jobs", "team")
    assert setting.heartbeat.problem() is None
    assert setting.resync(jobs=1) is None


def test_a_resync_that_finds_nothing_does_not_prove_that_a_watch_works(setting: Setting) -> None:
    problems = [setting.resync(jobs=count) for count in (1, 0, 0, 1, 0)]
    assert [problem is None for problem in problems] == [True, True, True, False, False]


def test_of_watches_of_single_namespaces_each_is_judged_by_its_own_events(setting: Setting) -> None:
    for _ in range(2):
        setting.heartbeat.resynced({("jobs", "a"): 1, ("jobs", "b"): 1, ("pods", "a"): 0})
        setting.heartbeat.event("jobs", "b")
    assert setting.heartbeat.problem() == (
        "The watch of jobs in a is silent: two resyncs found changes, and no event told of any."
    )
    setting.heartbeat.event("pods", "a")
    assert setting.heartbeat.problem() is not None
    setting.heartbeat.event("jobs", "a")
    assert setting.heartbeat.problem() is None


def test_events_that_come_right_after_each_resync_are_no_silence(setting: Setting) -> None:
    """In a busy cluster every resync finds a change whose event is still on its way."""
    for _ in range(5):
        assert setting.resync(jobs=1) is None
        setting.seconds += 0.1
        setting.heartbeat.event("jobs", "team")


def test_the_probes_answer_with_the_sentence(setting: Setting) -> None:
    is_listening = False

    async def use() -> None:
        nonlocal is_listening
        async with (
            listening(health_app(setting.heartbeat, lambda: is_listening), "127.0.0.1", 0) as port,
            httpx.AsyncClient(trust_env=False, base_url=f"http://127.0.0.1:{port}") as client,
        ):

            async def probe(path: str) -> tuple[int, str]:
                answer = await client.get(path)
                return answer.status_code, answer.text

            assert await probe("/healthz") == (200, "ok\n")
            assert await probe("/readyz") == (500, "The first look at all jobs is not done yet.\n")
            setting.resync()
            assert await probe("/readyz") == (500, "Not every port is open yet.\n")
            is_listening = True
            assert await probe("/readyz") == (200, "ok\n")
            setting.seconds += 10 * PERIOD
            status, sentence = await probe("/healthz")
            assert (status, sentence[:14]) == (500, "No full resync")
            # A cluster that cannot be reached is no reason to send trainers elsewhere: there is no elsewhere.
            assert await probe("/readyz") == (200, "ok\n")

    asyncio.run(use())
