"""The operator is killed after each of its writes, or never hears that it was done: every job ends as it would have.

All jobs of all stories live at once, each interrupted after another of its writes. From that write on nothing that the
operator asks for such a job reaches the server, so that one SIGKILL, once all have come that far, serves all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.cluster.scene import Scene
from tests.faults.calls import Call
from tests.faults.fault_table import ALL_FAULTS
from tests.faults.faults import Fate
from tests.faults.stories import STORIES, Story
from tests.faults.theatre import Life, Theatre

SAMPLE = ("retry", "suspend and resume", "deletion held up", "preemption by a queue")
"""Stories that are played when not every fault is asked for: between them they make every kind of write."""
MATRIX = tuple(STORIES) if ALL_FAULTS else SAMPLE
UNRECORDED = ("workers deleted", "create", "pytorchjobs", 1)
"""Nobody but the cluster knows yet of the PyTorchJob that somebody deletes while no operator is there: it is made again
as the same attempt, which is right, and another history."""


class Write(NamedTuple):
    """The n-th write of a kind in a job's life, n from 1."""

    verb: str
    resource: str
    number: int


class Case(NamedTuple):
    """A job that is interrupted."""

    name: str
    story: str
    write: Write
    """After which."""


@dataclass
class Interruption:
    """Keeps the answer to one write of each job from the operator, and whatever it asks for the job after that."""

    writes: Mapping[str, Write]
    """Job -> the write that it is interrupted after."""
    frozen: bool = True
    """False keeps the one answer only."""

    def __post_init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self.interrupted: set[str] = set()

    def after_answer(self, call: Call, code: int) -> Fate | None:
        """Of the fault proxy."""
        if not call.writes or call.job not in self.writes:
            return None
        self._counts[call.job, call.verb, call.resource] += 1
        if (call.verb, call.resource, self._counts[call.job, call.verb, call.resource]) != self.writes[call.job]:
            return None
        self.interrupted.add(call.job)
        return Fate.DROP

    def refuse(self, call: Call) -> Fate | None:
        """Of the fault proxy."""
        return Fate.DROP if self.frozen and call.job in self.interrupted else None


def numbered(life: Life) -> list[Write]:
    """The writes of a life."""
    return [Write(*kind, life.writes[: place + 1].count(kind)) for place, kind in enumerate(life.writes)]


def cases(lives: Mapping[str, Life], worlds: Sequence[str]) -> list[Case]:
    """Every write of every story in each of the worlds. Of a sample: each write in one of several worlds, in turn, or
    every second one in the only world, and the first of every kind.

    How many statuses are written depends on how fast pods are, so the last writes of a life may not come.
    """
    found = []
    for number, (story, life) in enumerate(lives.items()):
        for place, write in enumerate(numbered(life)):
            chosen = worlds if ALL_FAULTS else [worlds[place % len(worlds)]]
            if len(worlds) == 1 and not ALL_FAULTS and place % 2 and write.number > 1:
                continue
            chosen = [world for world in chosen if world != "goes-on" or (story, *write) != UNRECORDED]
            found += [Case(f"{world}-{number}-{place}", story, write) for world in chosen]
    return found


def begin(theatre: Theatre, chosen: Sequence[Case]) -> list[tuple[Story, list[Scene]]]:
    """Apply the jobs."""
    names: dict[str, list[str]] = {}
    for case in chosen:
        names.setdefault(case.story, []).append(case.name)
    return [(STORIES[story], theatre.stage.begin(STORIES[story], jobs)) for story, jobs in names.items()]


def compare(theatre: Theatre, lives: Mapping[str, Life], what: str, chosen: Sequence[Case], since: float) -> None:
    """All jobs have lived as they would have."""
    for story, life in lives.items():
        mine = [case for case in chosen if case.story == story]
        injected = f"{what} after each of {len({case.write for case in mine})} writes"
        theatre.compare(story, {injected: [case.name for case in mine]}, life, since=since)


def test_a_job_ends_the_same_whichever_write_its_operator_died_after_or_never_heard_of(theatre: Theatre) -> None:
    lives = theatre.undisturbed(*MATRIX)
    print({name: len(life.writes) for name, life in lives.items()})

    since = time.monotonic()
    killed = cases(lives, ["waits", "goes-on"])
    interruption = Interruption({case.name: case.write for case in killed})
    theatre.proxy.after_answer, theatre.proxy.refuse = interruption.after_answer, interruption.refuse
    casts = begin(theatre, killed)
    theatre.stage.play(*casts, until=interruption.interrupted.__contains__)
    theatre.operator.kill()
    theatre.proxy.calm()
    went_on = [(story, [s for s in scenes if s.name.startswith("goes-on")]) for story, scenes in casts]
    theatre.stage.play_alone(*went_on)
    theatre.operator.start()

    lost = cases(lives, ["lost"])
    unheard = Interruption({case.name: case.write for case in lost}, frozen=False)
    theatre.proxy.after_answer = unheard.after_answer
    theatre.stage.play(*casts, *begin(theatre, lost))
    theatre.proxy.calm()
    compare(theatre, lives, "killed", killed, since)
    compare(theatre, lives, "answer lost", lost, since)
    for chosen, done in ((killed, interruption.interrupted), (lost, unheard.interrupted)):
        print(f"{len(done)} of {len(chosen)} interrupted")
        # How many statuses are written depends on how fast the pods are; every kind of write has been interrupted.
        for story, life in lives.items():
            mine = {case.write[:2] for case in chosen if case.story == story and case.name in done}
            assert mine == set(life.writes), story
