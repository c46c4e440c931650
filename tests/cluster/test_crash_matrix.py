"""The operator is killed after each of its writes, or never hears that it was done: every job ends as it would have.

Many jobs live at once, each interrupted after another of its writes. The answer to that write is held back until all
have come that far, so that one SIGKILL serves all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from tests.cluster.api import Api, wait_until
from tests.cluster.calls import Call
from tests.cluster.conftest import UnluckyOperator
from tests.cluster.fault_proxy import DROP, HOLD, FaultProxy
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.stories import STORIES, Stage, Story

AT_ONCE = 28
"""Answers that can be held back at once: the operator keeps at most 32 connections."""


class Write(NamedTuple):
    """The n-th write of a kind in a job's life, n from 1."""

    verb: str
    resource: str
    number: int


@dataclass
class Interruption:
    """Keeps the answer to one write of each job from the operator."""

    writes: Mapping[str, Write]
    """Job -> the write that it is interrupted after."""
    how: str

    def __post_init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self.interrupted: dict[str, Write] = {}
        """Those that were."""

    def __call__(self, call: Call, code: int) -> str | None:
        if not call.writes or call.job not in self.writes:
            return None
        self._counts[call.job, call.verb, call.resource] += 1
        write = Write(call.verb, call.resource, self._counts[call.job, call.verb, call.resource])
        if write != self.writes[call.job]:
            return None
        self.interrupted[call.job] = write
        return self.how


@dataclass(frozen=True)
class Life:
    """How a job lives when nothing happens to it."""

    writes: Sequence[Write]
    ending: str
    history: Sequence[str]


@dataclass(frozen=True)
class Theatre:
    """All that a matrix needs."""

    stage: Stage
    operator: OperatorProcess
    proxy: FaultProxy

    def undisturbed(self, story: Story) -> Life:
        """The life that others are compared with, lived twice: what differs between the two proves nothing."""
        scenes = self.stage.begin(story, ["first", "second"])
        self.stage.play(story, scenes)
        endings = wait_until(
            lambda: [self.stage.ending(scene.name) for scene in scenes], lambda seen: seen[0] and seen[0] == seen[1]
        )
        histories = [self.stage.history(scene.name) for scene in scenes]
        assert histories[0] == histories[1]
        writes = max((self.proxy.changes(scene.name) for scene in scenes), key=len)
        kinds = [(verb, resource) for verb, resource, _, _ in writes]
        numbered = [Write(*kind, kinds[: place + 1].count(kind)) for place, kind in enumerate(kinds)]
        return Life(numbered, endings[0], histories[0])

    def same_as(self, life: Life, names: Sequence[str]) -> None:
        """The jobs have ended as the undisturbed ones did, and what was created and deleted on the way is the same."""
        for name in names:
            with suppress(AssertionError):
                wait_until(lambda name=name: self.stage.ending(name), lambda seen: seen == life.ending)  # type: ignore[misc]
            assert self.stage.ending(name).splitlines() == life.ending.splitlines(), name
            assert self.stage.history(name) == life.history, name

    def killed(self, story: Story, life: Life) -> list[Write]:
        """The operator dies after another write of each job. Some of the worlds wait for its return, others go on."""
        covered: list[Write] = []
        cases = [(f"{world}-{n}", write) for world in ("waits", "goes-on") for n, write in enumerate(life.writes)]
        for first in range(0, len(cases), AT_ONCE):
            self.proxy.after_answer = interruption = Interruption(dict(cases[first : first + AT_ONCE]), HOLD)
            scenes = self.stage.begin(story, list(interruption.writes))
            self.stage.play(story, scenes, until=interruption.interrupted.__contains__)
            self.operator.kill()
            self.proxy.after_answer = None
            self.stage.play_alone(story, [scene for scene in scenes if scene.name.startswith("goes-on")])
            self.operator.start()
            self.stage.play(story, scenes)
            self.same_as(life, list(interruption.writes))
            covered += interruption.interrupted.values()
        return covered

    def lost(self, story: Story, life: Life) -> list[Write]:
        """The operator does not hear that a write was done, another one of each job."""
        cases = {f"lost-{n}": write for n, write in enumerate(life.writes)}
        self.proxy.after_answer = interruption = Interruption(cases, DROP)
        scenes = self.stage.begin(story, list(interruption.writes))
        self.stage.play(story, scenes)
        self.proxy.after_answer = None
        self.same_as(life, list(interruption.writes))
        return list(interruption.interrupted.values())


@pytest.fixture
def theatre(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Theatre:
    """A running operator behind a proxy."""
    return Theatre(Stage(kubelet, api, unlucky.proxy), unlucky.process, unlucky.proxy)


@pytest.mark.parametrize("name", STORIES)
def test_a_job_ends_the_same_whichever_write_its_operator_died_after_or_never_heard_of(
    theatre: Theatre, name: str
) -> None:
    story = STORIES[name]
    life = theatre.undisturbed(story)
    killed = theatre.killed(story, life)
    lost = theatre.lost(story, life)
    print(f"{name}: {len(life.writes)} writes; killed after {len(killed)}, deaf to {len(lost)}")
    # How many statuses are written depends on how fast the pods are; every kind of write has been interrupted.
    assert _kinds(killed) == _kinds(lost) == _kinds(life.writes)


def _kinds(writes: Sequence[Write]) -> set[tuple[str, str]]:
    return {(write.verb, write.resource) for write in writes}
