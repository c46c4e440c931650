"""The API server is away, busy, silent, behind, or talks nonsense for a while: jobs live as ever, no process is lost.

Three jobs live through it: one that is applied as it begins, one whose pod fails meanwhile, and one that simply runs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import httpx
import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, wait_until
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, failure, success
from tests.faults.calls import Call
from tests.faults.conftest import UnluckyOperator
from tests.faults.fault_table import ALL_FAULTS
from tests.faults.faults import LISTS, Fate, Garbled, Refusal
from tests.faults.stories import AT_WORK, STORIES
from tests.faults.theatre import Theatre

WATCHES = ("finetunejobs", "pods", "pytorchjobs")
SHORT, LONG, VERY_LONG = 6.0, 75.0, 300.0
"""Seconds."""


@contextmanager
def _refused(unlucky: UnluckyOperator, refusal: Refusal) -> Iterator[None]:
    """Every request is refused like that, and no watch goes on."""
    unlucky.proxy.refuse = lambda call: refusal
    unlucky.proxy.end_watches(b"", *WATCHES)
    yield
    unlucky.proxy.refuse = None


@contextmanager
def _late(unlucky: UnluckyOperator, seconds: float) -> Iterator[None]:
    """Every event comes so late."""
    unlucky.proxy.on_event = lambda resource, event: seconds
    yield
    unlucky.proxy.on_event = None


@contextmanager
def _losing_every_second(unlucky: UnluckyOperator) -> Iterator[None]:
    """Of every two answers the second one never comes: its connection breaks."""
    numbers = itertools.count()
    unlucky.proxy.after_answer = lambda call, code: Fate.DROP if next(numbers) % 2 else None
    yield
    unlucky.proxy.after_answer = None


@contextmanager
def _garbled_lists(unlucky: UnluckyOperator) -> Iterator[None]:
    """Every list has another wrong shape."""
    shapes = itertools.cycle(LISTS.values())

    def garble(call: Call, code: int) -> Garbled | None:
        return next(shapes) if call.verb == "list" and code == 200 else None

    unlucky.proxy.after_answer = garble
    yield
    unlucky.proxy.after_answer = None


def _no_training_operator(unlucky: UnluckyOperator) -> AbstractContextManager[None]:
    return unlucky.process.control_plane.training_operator.stopped()


@dataclass(frozen=True)
class Outage:
    """Something that lasts for a while."""

    case: str
    """Of the published ones, or of ours."""
    injected: str
    of: Callable[[UnluckyOperator], AbstractContextManager[None]]
    seconds: float


def _for(seconds: float) -> list[Outage]:
    return [
        Outage("7", "503 to everything", lambda u: _refused(u, Refusal(503)), seconds),
        Outage("7", "out of reach", lambda u: u.proxy.out_of_reach(), seconds),
    ]


OUTAGES = [
    *_for(SHORT),
    Outage("4", "every event 5 s late", lambda u: _late(u, 5), 2 * SHORT),
    Outage("9", "429 to everything, again in 2 s", lambda u: _refused(u, Refusal(429, retry_after=2)), SHORT),
    Outage("8", "403 to everything", lambda u: _refused(u, Refusal(403, "is forbidden: not yet")), SHORT),
    Outage("8", "401 to everything", lambda u: _refused(u, Refusal(401)), SHORT),
    Outage("12", "training operator and webhook down", _no_training_operator, SHORT),
    Outage("garbled", "lists of wrong shapes", _garbled_lists, 2 * SHORT),
    Outage("lost", "every second answer lost", _losing_every_second, SHORT),
]
LENGTHY = [
    *_for(20),
    *_for(LONG),
    *_for(VERY_LONG),
    Outage("8", "connections accepted, then silence", lambda u: u.proxy.half_open(), SHORT),
    Outage("8", "connections accepted, then silence", lambda u: u.proxy.half_open(), LONG),
    Outage("4", "every event 30 s late", lambda u: _late(u, 30), LONG),
    Outage("9", "429 to everything, again in 7 s", lambda u: _refused(u, Refusal(429, retry_after=7)), LONG),
    Outage("garbled", "lists of wrong shapes", _garbled_lists, LONG),
    Outage("lost", "every second answer lost", _losing_every_second, LONG),
]


@pytest.fixture
def scene(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Scene:
    """One job."""
    return Scene(api, kubelet, "guard")


@pytest.mark.parametrize(
    "outage", OUTAGES + LENGTHY * ALL_FAULTS, ids=lambda outage: f"{outage.injected}, {outage.seconds:g} s"
)
def test_jobs_live_through_it(theatre: Theatre, unlucky: UnluckyOperator, outage: Outage) -> None:
    story, life = STORIES["retry"], theatre.undisturbed("retry")["retry"]
    since, pid = time.monotonic(), unlucky.process.server.pid
    scenes = theatre.stage.begin(story, ["fails", "runs"])
    theatre.stage.play((story, scenes), until=lambda name: theatre.stage.phase(name) in AT_WORK)
    with outage.of(unlucky):
        end = time.monotonic() + outage.seconds
        scenes += theatre.stage.begin(story, ["begins"])
        theatre.stage.play((story, scenes), until=lambda name: name == "runs" or time.monotonic() > end)
        time.sleep(max(0.0, end - time.monotonic()))
    theatre.stage.play((story, scenes))
    theatre.compare(
        outage.case, {f"{outage.injected}, {outage.seconds:g} s": [s.name for s in scenes]}, life, since=since
    )
    assert (unlucky.process.running, unlucky.process.server.pid) == (True, pid)


def _healthz(unlucky: UnluckyOperator) -> tuple[int, str]:
    answer = httpx.get(f"{unlucky.process.health_url}/healthz", trust_env=False)
    return answer.status_code, answer.text.strip()


def test_an_api_server_out_of_reach_is_reported_and_waited_for(unlucky: UnluckyOperator, scene: Scene) -> None:
    scene.apply()
    pods = scene.run()
    pid = unlucky.process.server.pid
    with unlucky.proxy.out_of_reach():
        # Three resync periods long.
        wait_until(lambda: _healthz(unlucky), lambda seen: "No full resync succeeded" in seen[1])
        scene.kubelet.fail(pods[0], 201, failure(Reason.HUB_UNAVAILABLE))
        assert unlucky.process.running
    scene.wait_attempts("HubUnavailable")
    scene.run(attempt=2)
    wait_until(lambda: _healthz(unlucky), lambda seen: seen == (200, "ok"))
    scene.kubelet.succeed(scene.pod(attempt=2), success())
    scene.wait_phase("Succeeded")
    assert unlucky.process.server.pid == pid
    assert len(unlucky.proxy.created("guard", "pytorchjobs")) == 2


def test_an_operator_that_starts_before_the_api_server_gets_to_work(unlucky: UnluckyOperator, scene: Scene) -> None:
    unlucky.process.stop()
    scene.apply()
    with unlucky.proxy.out_of_reach():
        unlucky.process.server.launch()
        ended = wait_until(lambda: _gave_up_or_waits(unlucky))
    if ended == "gave up":
        assert unlucky.process.server.exit_code == 1
    unlucky.process.start()
    scene.run()


def _gave_up_or_waits(unlucky: UnluckyOperator) -> str:
    if not unlucky.process.running:
        return "gave up"
    try:
        httpx.get(f"{unlucky.process.health_url}/readyz", trust_env=False)
    except httpx.TransportError:
        return ""
    return "waits"


def test_a_restart_of_the_api_server_ends_no_attempt(
    unlucky: UnluckyOperator, scene: Scene, control_plane: ControlPlane
) -> None:
    scene.apply()
    pods = scene.run()
    for _ in range(2):
        control_plane.api_server.restart()
        wait_until(lambda: _healthz(unlucky), lambda seen: seen == (200, "ok"))
    for server in control_plane.servers:
        server.start()  # those that gave up meanwhile
    assert "attempts" not in scene.status()
    scene.kubelet.succeed(pods[0], success())
    scene.wait_phase("Succeeded")
    assert len(unlucky.proxy.created("guard", "pytorchjobs")) == 1
