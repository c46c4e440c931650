"""Every order in which watches tell, writes are answered or lost, and the operator is killed, up to a number of steps.

Each order is lived from the beginning; then nothing is in the way any more. A reconcile being a function of what was
read, the job ends as it would have, what was created and deleted on the way is the same, and no request was made of a
view that is older than the sender's own last write.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from enum import Enum

import pytest

from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from tests.operator.simulation import own_writes, rest
from tests.operator.simulation.model import Model
from tests.operator.simulation.moments import digest
from tests.operator.simulation.stories import STORIES, Story, ending, history
from tests.operator.simulation.wire import Call, Fate
from tests.operator.simulation.world import World

Ending = tuple[str, list[str]]
"""What is left at the end, and what was created and deleted on the way."""
Moment = tuple[bytes, tuple[str, ...]]
"""A digest of everything, and what was created and deleted so far."""


class Step(Enum):
    """Something that happens next."""

    JOB = FINETUNE_PLURAL
    """The watch of that kind tells the oldest thing that it has to tell."""
    PYTORCH_JOB = PYTORCH_PLURAL
    POD = PODS_PLURAL
    ANSWERED = "the write that waits is carried out and answered"
    UNANSWERED = "it is carried out, and the answer is lost"
    LOST = "it does not arrive"
    KILLED_BEFORE = "the operator dies before it is sent, and a new one starts"
    KILLED_AFTER = "it is carried out, the operator dies, and a new one starts"


WATCHES = (Step.JOB, Step.PYTORCH_JOB, Step.POD)
KILLS = (Step.KILLED_BEFORE, Step.KILLED_AFTER)
LOSSES = (Step.UNANSWERED, Step.LOST)
FATES = {Step.ANSWERED: None, Step.UNANSWERED: Fate.UNANSWERED, Step.LOST: Fate.LOST, Step.KILLED_AFTER: Fate.LAST_WORD}
ALL = os.environ.get("FAULTS") == "all"
LIMITS = {
    "kills": (6, KILLS, 6) if ALL else (5, KILLS, 2),
    "losses": (6, LOSSES + KILLS, 2) if ALL else (5, LOSSES, 1),
}
"""Steps, after which nothing is in the way any more; what may go wrong in one order, and how often."""


class Life:
    """One life of a job, a step at a time."""

    def __init__(self, story: Story) -> None:
        self.world, self.story = World(), story
        self.model = Model(self.world.server)
        self.world.witness = self._watch_over
        self.written: list[list[Call]] = []
        self._start()
        story.begin(self.world)
        self._hold()
        story.happens(self.world)
        self._go_on()

    def possible(self) -> list[Step]:
        """What can happen next."""
        operator = self.world.operators[-1]
        told = [step for step in WATCHES if operator.pending[step.value]]
        return [*told, *(FATES if operator.wire.held else ()), Step.KILLED_BEFORE]

    def take(self, step: Step) -> None:
        """Let it happen."""
        operator = self.world.operators[-1]
        if step in WATCHES:
            operator.deliver(step.value)
        elif step is Step.KILLED_BEFORE:
            operator.crash()
        else:
            operator.wire.let_go(FATES[step], only_first=True)
        self._go_on()

    def moment(self) -> Moment:
        """All that its future and its ending depend on."""
        return digest(self.world, self.model), tuple(self._history())

    def let_go(self) -> None:
        """Nothing is in the way any more: what waits goes on, and watches tell everything at once."""
        operator = self.world.operators[-1]
        operator.wire.hold_writes = False
        operator.wire.let_go()
        operator.deliver_all()
        self._go_on()

    def end(self) -> Ending:
        """How it ends; once it was let go."""
        self.story.end(self.world)
        rest.check(self.world, self.model)
        return ending(self.world), self._history()

    def _history(self) -> list[str]:
        return history([call for written in self.written for call in written])

    def _watch_over(self, call: Call, sent: Sequence[Call]) -> None:
        self.model.witness(call, sent)
        own_writes.witness(call, sent)

    def _start(self) -> None:
        self.written.append(self.world.start_operator().wire.written)

    def _hold(self) -> None:
        operator = self.world.operators[-1]
        operator.wire.hold_writes = True
        operator.late |= set(operator.pending)

    def _go_on(self) -> None:
        self.world.pass_time(0.001)
        if not self.world.alive:
            self._start()
            self._hold()
        self.world.surroundings_work()
        self.world.pass_time(0.6)


def endings(story: Story, steps: int, wrong: Sequence[Step], limit: int) -> Iterator[tuple[list[Step], Ending]]:
    """Every order and how it ends, but for those that come to a moment at which another one was.

    Args:
        story: what is lived.
        steps: how many there are.
        wrong: what may go wrong.
        limit: how often something may.
    """
    ahead: list[list[Step]] = [[]]
    been: set[tuple[int, int, Moment]] = set()
    while ahead:
        taken = ahead.pop()
        life = Life(story)
        try:
            for step in taken:
                life.take(step)
            left = limit - sum(step in wrong for step in taken)
            while _is_new((len(taken), left, life.moment()), been):
                allowed = (*WATCHES, Step.ANSWERED, *(wrong if left else ()))
                following = [step for step in life.possible() if step in allowed]
                if len(taken) == steps or not following:
                    life.let_go()
                    if _is_new((steps, -1, life.moment()), been):
                        yield taken, life.end()
                    break
                ahead += [[*taken, other] for other in following[1:]]
                taken = [*taken, following[0]]
                left -= following[0] in wrong
                life.take(following[0])
        except AssertionError as error:
            raise AssertionError(f"{[step.name for step in taken]}: {error}") from error
        finally:
            life.world.close()


def _is_new(here: tuple[int, int, Moment], been: set[tuple[int, int, Moment]]) -> bool:
    count = len(been)
    been.add(here)
    return len(been) > count


def undisturbed(story: Story) -> Ending:
    """How it ends where nothing goes wrong."""
    life = Life(story)
    try:
        life.let_go()
        return life.end()
    finally:
        life.world.close()


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("limits", LIMITS)
def test_in_whatever_order_things_happen_a_job_ends_the_same(name: str, limits: str) -> None:
    expected = undisturbed(STORIES[name])
    for order, found in endings(STORIES[name], *LIMITS[limits]):
        assert found == expected, [step.name for step in order]


def test_one_order_comes_to_one_moment_and_others_to_others() -> None:
    def moment(*steps: Step) -> Moment:
        life = Life(STORIES["retry"])
        try:
            for step in steps:
                assert step in life.possible()
                life.take(step)
            return life.moment()
        finally:
            life.world.close()

    waits = (Step.POD, Step.ANSWERED)
    orders = [(), (Step.POD,), (Step.PYTORCH_JOB,), waits, *((Step.POD, step) for step in (*LOSSES, *KILLS))]
    moments = [moment(*order) for order in orders]
    assert len(set(moments)) == len(orders)
    assert moment(*waits) == moments[orders.index(waits)]
    ends = (Step.POD, Step.PYTORCH_JOB, Step.ANSWERED)
    assert moment(*ends) == moment(ends[1], ends[0], ends[2])
