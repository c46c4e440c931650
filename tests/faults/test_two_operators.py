"""Two operators at once, as in a rolling update or behind a broken network: they do what one would have done."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene
from tests.faults.conftest import UnluckyOperator
from tests.faults.stories import AT_WORK, STORIES
from tests.faults.theatre import Theatre

PLAYED = ("retry", "suspend and resume", "preemption by a queue", "verification", "workers deleted")
EACH = 3


@pytest.fixture
def second(unlucky: UnluckyOperator, control_plane: ControlPlane, tmp_path: Path) -> Iterator[OperatorProcess]:
    """Another operator behind the same proxy, not started."""
    process = OperatorProcess(control_plane, tmp_path / "second", {"concurrency": 64}, server=unlucky.proxy.url)
    yield process
    process.stop()


def test_two_operators_do_what_one_would(theatre: Theatre, second: OperatorProcess) -> None:
    lives = theatre.undisturbed(*PLAYED)
    since = time.monotonic()
    second.start()
    casts = {
        name: theatre.stage.begin(STORIES[name], [f"two-{number}-{n}" for n in range(EACH)])
        for number, name in enumerate(PLAYED)
    }
    theatre.stage.play(*((STORIES[name], scenes) for name, scenes in casts.items()))
    for name, scenes in casts.items():
        injected = {f"two operators: {name}": [scene.name for scene in scenes]}
        theatre.compare("13", injected, lives[name], since=since)
    # Whoever wrote a status tells of it, so nothing is told twice.
    for scene in casts["retry"] + casts["suspend and resume"]:
        _nothing_is_told_twice(scene)


def _nothing_is_told_twice(scene: Scene) -> None:
    events = Counter(scene.events())
    assert max(events.values()) <= 2, events
    assert events["Normal", "Succeeded"] == 1, events
    assert events["Normal", "AttemptCreated"] == 2, events


@pytest.mark.parametrize("comes_back", ["while the second attempts run", "when all is over"])
def test_an_operator_that_stood_still_and_comes_back_does_no_harm(
    theatre: Theatre, unlucky: UnluckyOperator, second: OperatorProcess, comes_back: str
) -> None:
    lives = theatre.undisturbed(*PLAYED)
    since = time.monotonic()
    casts = {name: theatre.stage.begin(STORIES[name], [f"still-{n}"]) for n, name in enumerate(PLAYED)}
    plays = [(STORIES[name], scenes) for name, scenes in casts.items()]
    theatre.stage.play(*plays, until=lambda name: theatre.stage.phase(name) in AT_WORK)
    # As behind a broken network it believes what it knew then, and what it has begun is still to be done.
    os.kill(unlucky.process.server.pid, signal.SIGSTOP)
    try:
        second.start()
        if comes_back == "when all is over":
            theatre.stage.play(*plays)
        else:
            theatre.stage.play(*plays, until=lambda name: len(theatre.stage.created(name)) > 1)
    finally:
        os.kill(unlucky.process.server.pid, signal.SIGCONT)
    theatre.stage.play(*plays)
    # It has heard of everything now: what it does about that, it has done.
    second.stop()
    later = STORIES["retry"], theatre.stage.begin(STORIES["retry"], ["later"])
    theatre.stage.play(later)
    for name, scenes in casts.items():
        injected = {f"one stood still, back {comes_back}: {name}": [scene.name for scene in scenes]}
        theatre.compare("14", injected, lives[name], since=since)
    theatre.compare("14", {"one stood still, and works on": ["later"]}, lives["retry"], since=since)
