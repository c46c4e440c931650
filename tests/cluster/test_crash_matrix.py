"""The operator is killed after each of its writes, or never hears that it was done: every job ends as it would have.

Many jobs live at once, each interrupted after another of its writes. The answer to that write is held back until all
have come that far, so that one SIGKILL serves all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from tests.cluster.api import Api, wait_until
from tests.cluster.conftest import UnluckyOperator
from tests.cluster.fault_proxy import DROP, HOLD, Call, FaultProxy
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.stories import STORIES, Stage, Story

AT_ONCE = 28
"""Answers that can be held back at once: the operator keeps at most 32 connections."""


@dataclass
class Interruption:
    """Keeps the answer to a job's n-th write from the operator."""

    writes: Mapping[str, int]
    """Job -> n, from 1."""
    how: str

    def __post_init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.interrupted: dict[str, tuple[str, str]] = {}
        """Job -> verb and resource of the write that it was interrupted after."""

    def __call__(self, call: Call, code: int) -> str | None:
        if not call.writes or call.job not in self.writes:
            return None
        self._counts[call.job] += 1
        if self._counts[call.job] != self.writes[call.job]:
            return None
        self.interrupted[call.job] = (call.verb, call.resource)
        return self.how


@dataclass(frozen=True)
class Life:
    """How a job lives when nothing happens to it."""

    writes: Sequence[tuple[str, str]]
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
            lambda: [self.stage.ending(scene.name) for scene in scenes], lambda seen: seen[0] == seen[1]
        )
        histories = [self.stage.history(scene.name) for scene in scenes]
        assert histories[0] == histories[1]
        writes = max((self.proxy.changes(scene.name) for scene in scenes), key=len)
        return Life([(verb, resource) for verb, resource, _, _ in writes], endings[0], histories[0])

    def same_as(self, life: Life, names: Sequence[str]) -> None:
        """The jobs have ended as the undisturbed ones did, and what was created and deleted on the way is the same."""
        for name in names:
            try:
                wait_until(lambda name=name: self.stage.ending(name), lambda seen: seen == life.ending)  # type: ignore[misc]
            except AssertionError:
                assert self.stage.ending(name).splitlines() == life.ending.splitlines(), name
            assert self.stage.history(name) == life.history, name

    def killed(self, story: Story, life: Life, numbers: Sequence[int]) -> Counter[tuple[str, str]]:
        """The operator dies after the n-th write of each job. Some of the worlds wait for its return, others go on."""
        covered: Counter[tuple[str, str]] = Counter()
        cases = [(f"{world}-{number}", number) for world in ("waits", "goes-on") for number in numbers]
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
            covered.update(interruption.interrupted.values())
        return covered

    def lost(self, story: Story, life: Life, numbers: Sequence[int]) -> Counter[tuple[str, str]]:
        """The operator does not hear that the n-th write of each job was done."""
        self.proxy.after_answer = interruption = Interruption({f"lost-{number}": number for number in numbers}, DROP)
        scenes = self.stage.begin(story, list(interruption.writes))
        self.stage.play(story, scenes)
        self.proxy.after_answer = None
        self.same_as(life, list(interruption.writes))
        return Counter(interruption.interrupted.values())


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
    numbers = range(1, len(life.writes) + 1)
    killed = theatre.killed(story, life, numbers)
    lost = theatre.lost(story, life, numbers)
    print(f"{name}: {len(life.writes)} writes; killed after {sum(killed.values())}, deaf to {sum(lost.values())}")
    assert set(killed) == set(lost) == set(life.writes)
