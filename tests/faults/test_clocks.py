"""Clocks are wrong by an hour, the operator's or those of the nodes: jobs live as they would have."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.cluster import kubelet as kubelet_module
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator_process import OperatorProcess
from tests.faults import skewed_operator
from tests.faults.conftest import UnluckyOperator
from tests.faults.stories import AT_WORK, STORIES
from tests.faults.theatre import Theatre

HOUR = 3600
PLAYED = ("retry", "suspend and resume", "preemption by a queue", "verification")


@pytest.fixture
def skewed(
    theatre: Theatre, unlucky: UnluckyOperator, control_plane: ControlPlane, tmp_path: Path
) -> Iterator[dict[int, OperatorProcess]]:
    """Operators whose clocks are wrong, not started, in place of the one whose clock is right."""
    theatre.undisturbed(*PLAYED)
    unlucky.process.stop()
    operators = {
        hours: OperatorProcess(
            control_plane,
            tmp_path / f"{hours}",
            {"concurrency": 64},
            server=unlucky.proxy.url,
            command=(sys.executable, "-P", skewed_operator.__file__, str(hours * HOUR)),
        )
        for hours in (-1, 1)
    }
    yield operators
    for operator in operators.values():
        operator.stop()


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_clock_of_the_operator_is_wrong(theatre: Theatre, skewed: dict[int, OperatorProcess], hours: int) -> None:
    since = time.monotonic()
    skewed[hours].start()
    casts = {name: theatre.stage.begin(STORIES[name], [f"skewed-{n}"]) for n, name in enumerate(PLAYED)}
    theatre.stage.play(*((STORIES[name], scenes) for name, scenes in casts.items()))
    for name, scenes in casts.items():
        names = {f"operator's clock {hours:+} h: {name}": [scene.name for scene in scenes]}
        theatre.compare("18", names, theatre.lives[name], since=since)


@pytest.mark.parametrize("hours", [-1, 1])
def test_an_operator_takes_over_from_one_whose_clock_was_wrong(
    theatre: Theatre, unlucky: UnluckyOperator, skewed: dict[int, OperatorProcess], hours: int
) -> None:
    since, story = time.monotonic(), STORIES["retry"]
    skewed[hours].start()
    scenes = theatre.stage.begin(story, ["works", "retries"])
    theatre.stage.play((story, scenes[:1]), until=lambda name: theatre.stage.phase(name) in AT_WORK)
    theatre.stage.play((story, scenes[1:]), until=lambda name: theatre.stage.phase(name) == "Retrying")
    skewed[hours].kill()
    unlucky.process.start()
    theatre.stage.play((story, scenes))
    injected = f"operator's clock {hours:+} h, then right"
    theatre.compare("18", {injected: [scene.name for scene in scenes]}, theatre.lives["retry"], since=since)


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_clocks_of_the_nodes_are_wrong(theatre: Theatre, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    lives = theatre.undisturbed(*PLAYED)
    since = time.monotonic()
    monkeypatch.setattr(kubelet_module, "_now", partial(_time, hours))
    casts = {name: theatre.stage.begin(STORIES[name], [f"skewed-{n}"]) for n, name in enumerate(PLAYED)}
    theatre.stage.play(*((STORIES[name], scenes) for name, scenes in casts.items()))
    for name, scenes in casts.items():
        names = {f"nodes' clocks {hours:+} h: {name}": [scene.name for scene in scenes]}
        theatre.compare("18", names, lives[name], since=since)


def _time(hours: int) -> str:
    return (dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")
