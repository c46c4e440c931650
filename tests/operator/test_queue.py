"""The work queue: one look at a time per job, none lost, none that nobody asked for, and nobody waits for another.

Time is the event loop's own, made up: it jumps to the next timer whenever nothing else is to be done.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.queue import SPARE_TIMERS, Key, NotBefore, WorkQueue
from tests.operator.jumping_loop import JumpingLoop

A, B, C = (Key("space", name) for name in "abc")
SETTLE = 0.5


class Desk:
    """Somebody who works through a queue, and what was done when."""

    def __init__(self, *, concurrency: int = 1, settle_seconds: float = 0.0, takes_seconds: float = 0.0) -> None:
        self.unknown: set[Key] = set()
        """Keys of jobs of which nobody knows."""
        self.queue = WorkQueue(
            self._work,
            concurrency=concurrency,
            settle_seconds=settle_seconds,
            is_known=lambda key: key not in self.unknown,
        )
        self.looks: list[tuple[Key, float]] = []
        """Key and time of the begin of every look."""
        self.ends: list[tuple[Key, float]] = []
        self.answers: dict[Key, list[float | Exception | None]] = {}
        """What the next looks at a key return or raise; None without any."""
        self.takes_seconds = takes_seconds
        self.busy: Counter[Key] = Counter()
        self.most_at_once = 0

    async def _work(self, key: Key) -> float | None:
        self.busy[key] += 1
        assert self.busy[key] == 1, "two looks at one job at the same time"
        self.most_at_once = max(self.most_at_once, self.busy.total())
        self.looks.append((key, _now()))
        await asyncio.sleep(self.takes_seconds)
        self.busy[key] -= 1
        self.ends.append((key, _now()))
        answers = self.answers.get(key)
        answer = answers.pop(0) if answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def times(self, key: Key) -> list[float]:
        """When looks at `key` began (seconds)."""
        return [time for seen, time in self.looks if seen == key]

    @property
    def keys(self) -> list[Key]:
        """The keys in the order of their looks."""
        return [key for key, _ in self.looks]


def _now() -> float:
    return asyncio.get_running_loop().time()


def play(desk: Desk, story: Callable[[], Awaitable[None]], *, then_seconds: float = 1000.0) -> None:
    """Run the queue through a story and for a while longer."""

    async def main() -> None:
        worker = asyncio.create_task(desk.queue.run())
        await story()
        await asyncio.sleep(then_seconds)
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)

    _run(main())


def _run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(work)


def adding(queue: WorkQueue, *keys: Key, **options: Any) -> Callable[[], Awaitable[None]]:
    """A story in which keys are added at once."""

    async def story() -> None:
        for key in keys:
            queue.add(key, **options)

    return story


def test_a_key_is_looked_at_once_however_often_it_is_added() -> None:
    desk = Desk()
    play(desk, adding(desk.queue, A, A, B, A))
    assert desk.keys == [A, B]


def test_an_event_during_a_look_leads_to_one_more_look() -> None:
    desk = Desk(takes_seconds=1)

    async def story() -> None:
        desk.queue.add(A)
        await asyncio.sleep(0.5)
        for _ in range(3):
            desk.queue.add(A)

    play(desk, story)
    assert desk.times(A) == [0, 1]


def test_a_key_is_looked_at_again_when_its_look_asked_for_it() -> None:
    desk = Desk()
    desk.answers[A] = [10.0, 0.0]
    play(desk, adding(desk.queue, A))
    assert desk.times(A) == [0, 10, 10]


@pytest.mark.parametrize("wishes", list(itertools.permutations([7.0, 3.0, 5.0])))
def test_the_earliest_wish_counts_and_the_others_are_void(wishes: tuple[float, ...]) -> None:
    desk = Desk()

    async def story() -> None:
        for wish in wishes:
            desk.queue.add(A, after_seconds=wish)

    play(desk, story)
    assert desk.times(A) == [3]


def test_an_event_comes_before_a_wish_and_replaces_it() -> None:
    desk = Desk()
    desk.answers[A] = [60.0]

    async def story() -> None:
        desk.queue.add(A)
        await asyncio.sleep(10)
        desk.queue.add(A)

    play(desk, story)
    assert desk.times(A) == [0, 10]


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_wish_that_comes_due_during_a_look_is_kept(concurrency: int) -> None:
    desk = Desk(takes_seconds=5, concurrency=concurrency)

    async def story() -> None:
        desk.queue.add(A)
        await asyncio.sleep(1)
        desk.queue.add(A, after_seconds=2)

    play(desk, story)
    assert desk.times(A) == [0, 5]


@pytest.mark.parametrize(("wish", "second"), [(0.2, 1.0), (0.5, 1.0), (0.7, 1.2), (1.0, 1.5), (3.0, 3.5)])
def test_a_wish_during_a_look_is_granted_in_its_time_and_not_before_its_end(wish: float, second: float) -> None:
    desk = Desk(takes_seconds=1, concurrency=2)

    async def story() -> None:
        desk.queue.add(A)
        await asyncio.sleep(0.5)
        desk.queue.add(A, after_seconds=wish)

    play(desk, story)
    assert desk.times(A) == [0, second]


def test_without_a_settle_time_looks_follow_at_once() -> None:
    times: list[float] = []

    async def main() -> None:
        async def work(_: Key) -> None:
            times.append(_now())

        queue = WorkQueue(work, concurrency=1)
        worker = asyncio.create_task(queue.run())
        for _ in range(3):
            queue.add(A)
            await asyncio.sleep(0.1)
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)

    _run(main())
    assert times == pytest.approx([0, 0.1, 0.2])


def test_two_looks_at_one_job_are_a_settle_time_apart() -> None:
    desk = Desk(settle_seconds=SETTLE)

    async def story() -> None:
        for _ in range(100):
            desk.queue.add(A)
            await asyncio.sleep(0.01)

    play(desk, story)
    times = desk.times(A)
    assert len(times) == 3
    assert all(later - earlier >= SETTLE for earlier, later in itertools.pairwise(times))


def test_a_far_deadline_that_is_set_again_at_every_report_leaves_nothing_behind() -> None:
    desk = Desk()
    day, period = 24 * 3600.0, 5.0
    most = 0

    async def story() -> None:
        nonlocal most
        for report in range(round(day / period)):
            desk.answers[A] = [day - report * period]
            desk.queue.add(A)
            await asyncio.sleep(period)
            most = max(most, desk.queue.timers())

    play(desk, story)
    assert len(desk.times(A)) >= day / period
    assert most <= SPARE_TIMERS + 3


def test_void_timers_go_as_soon_as_they_are_most_and_those_that_count_stay() -> None:
    desk = Desk(concurrency=3)
    most, wishes = 2 * 3 + SPARE_TIMERS, 2 * SPARE_TIMERS

    async def story() -> None:
        for key in (B, C):
            desk.queue.add(key, after_seconds=900)
        kept = []
        for number in range(wishes):
            desk.queue.add(A, after_seconds=800 - number)
            desk.queue.add(A, after_seconds=800 - number)  # said twice, kept once
            kept.append(desk.queue.timers())
        assert max(kept) == most
        assert kept[: most - 1] == [*range(3, most + 1), 3]

    play(desk, story)
    assert desk.looks == [(A, 801 - wishes), (B, 900), (C, 900)]


def test_jobs_that_come_and_go_leave_no_timer() -> None:
    desk = Desk(concurrency=16)

    async def story() -> None:
        for number in range(5000):
            key = Key("space", str(number))
            desk.answers[key] = [3600.0]
            desk.queue.add(key)
            await asyncio.sleep(0.01)
            desk.queue.forget(key)
        assert desk.queue.timers() <= SPARE_TIMERS + 3

    play(desk, story)


def test_no_more_jobs_are_looked_at_at_once_than_allowed_and_no_fewer() -> None:
    desk = Desk(concurrency=3, takes_seconds=1)
    keys = [Key("space", str(number)) for number in range(9)]
    play(desk, adding(desk.queue, *keys))
    assert desk.most_at_once == 3
    assert desk.keys == keys
    assert [time for _, time in desk.ends] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_slow_job_keeps_nobody_waiting() -> None:
    hung = asyncio.Event()

    async def main() -> None:
        seen: list[Key] = []

        async def work(key: Key) -> None:
            if key == A:
                await hung.wait()
            seen.append(key)

        queue = WorkQueue(work, concurrency=2)
        worker = asyncio.create_task(queue.run())
        for key in (A, B, C):
            queue.add(key)
        await asyncio.sleep(1)
        assert seen == [B, C]
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)

    _run(main())


def test_a_look_that_raises_is_repeated_later_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    desk.answers[A] = [ValueError("a bug"), None]
    play(desk, adding(desk.queue, A, B))
    assert desk.looks == [(A, 0), (B, 0), (A, 60)]
    assert [record.getMessage() for record in caplog.records] == ["Reconciling space/a failed in an unforeseen way."]
    assert "a bug" in caplog.text


def test_a_server_that_wants_to_be_left_alone_is_asked_again_afterwards() -> None:
    desk = Desk(settle_seconds=SETTLE)
    desk.answers[A] = [NotBefore(30), None]
    play(desk, adding(desk.queue, A))
    assert desk.times(A) == [0, 30]
    assert str(NotBefore(30)) == "not before 30 s"


def test_who_ends_the_queue_ends_the_looks_under_way() -> None:
    async def main() -> None:
        async def work(_: Key) -> None:
            await asyncio.sleep(60)

        queue = WorkQueue(work, concurrency=1)
        worker = asyncio.create_task(queue.run())
        queue.add(A)
        await asyncio.sleep(1)
        worker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker

    _run(main())


def test_an_event_does_not_shorten_the_time_that_the_server_asked_for() -> None:
    desk = Desk(settle_seconds=SETTLE, takes_seconds=1)
    desk.answers[A] = [NotBefore(30), None]

    async def story() -> None:
        desk.queue.add(A)
        await asyncio.sleep(0.5)
        desk.queue.add(A)
        desk.queue.add(A, after_seconds=2)
        await asyncio.sleep(5)
        desk.queue.add(A)

    play(desk, story)
    assert desk.times(A) == [0, 31]


def test_what_is_forgotten_is_not_looked_at_any_more() -> None:
    desk = Desk()

    async def story() -> None:
        desk.queue.add(A, after_seconds=5)
        desk.queue.forget(A)
        desk.queue.forget(B)

    play(desk, story)
    assert desk.keys == []


def test_a_job_that_is_forgotten_during_its_look_can_come_back() -> None:
    desk = Desk(takes_seconds=1)

    async def story() -> None:
        desk.queue.add(A)
        await asyncio.sleep(0.5)
        desk.queue.forget(A)
        desk.queue.add(A)

    play(desk, story)
    assert desk.times(A) == [0, 1]


@pytest.mark.parametrize(
    "moment", ["due", "waiting for a slot", "looked at", "looked at, with a wish", "looked at, and due", "over"]
)
def test_nothing_is_kept_of_what_is_forgotten(moment: str) -> None:
    desk = Desk(takes_seconds=1)
    desk.answers[A] = [5.0 if "wish" in moment else None]

    async def story() -> None:
        if moment == "waiting for a slot":
            desk.queue.add(B)
        desk.queue.add(A, after_seconds=5 if moment == "due" else 0)
        await asyncio.sleep(2 if moment == "over" else 0.5)
        if moment == "looked at, and due":
            desk.queue.add(A)
            desk.queue.add(A, after_seconds=9)
        desk.queue.forget(A)

    play(desk, story)
    assert desk.queue.size() == (1 if moment == "waiting for a slot" else 0)
    assert len(desk.times(A)) == (0 if moment == "due" else 1)


@pytest.mark.parametrize(
    ("answer", "second"), [(None, None), (5.0, 5.0), (NotBefore(30), 30.0), (ValueError("a bug"), 60.0)]
)
@pytest.mark.parametrize("settle", [0.0, SETTLE])
def test_of_a_job_that_nobody_knows_nothing_is_kept_but_that_it_is_to_be_looked_at_again(
    answer: float | Exception | None, second: float | None, settle: float
) -> None:
    """A resync found it, and it could not be read yet."""
    desk = Desk(settle_seconds=settle)
    desk.unknown.add(A)
    desk.answers[A] = [answer]
    play(desk, adding(desk.queue, A))
    assert desk.times(A) == [0, *([second] if second is not None else [])]
    assert desk.queue.size() == 0


def test_an_event_during_a_look_at_a_job_that_nobody_knows_leads_to_one_more() -> None:
    desk = Desk(takes_seconds=1)
    desk.unknown.add(A)

    async def story() -> None:
        desk.queue.add(A)
        await asyncio.sleep(0.5)
        desk.queue.add(A)

    play(desk, story)
    assert desk.times(A) == [0, 1]
    assert desk.queue.size() == 0


def test_the_depth_counts_what_could_be_looked_at_now() -> None:
    desk = Desk(takes_seconds=1)

    async def story() -> None:
        for number, key in enumerate((A, B, C)):
            desk.queue.add(key)
            assert desk.queue.depth() == number + 1
        desk.queue.add(Key("space", "later"), after_seconds=60)
        await asyncio.sleep(0.5)
        assert desk.queue.depth() == 2

    play(desk, story)
    assert desk.queue.depth() == 0


@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(["add", "add later", "forget"]),
            st.sampled_from([A, B, C]),
            st.sampled_from([0.0, 0.1, 0.3, 1.0]),
        ),
        max_size=30,
    ),
    concurrency=st.integers(1, 3),
    settle=st.sampled_from([0.0, SETTLE]),
    takes=st.sampled_from([0.0, 0.2]),
)
def test_whatever_is_asked_the_last_wish_of_a_job_is_granted_and_the_rules_hold(
    calls: list[tuple[str, Key, float]], concurrency: int, settle: float, takes: float
) -> None:
    desk = Desk(concurrency=concurrency, settle_seconds=settle, takes_seconds=takes)
    asked: dict[Key, float] = {}

    async def story() -> None:
        for what, key, seconds in calls:
            if what == "forget":
                desk.queue.forget(key)
                asked.pop(key, None)
            else:
                wish = seconds if what == "add later" else 0.0
                desk.queue.add(key, after_seconds=wish)
                asked[key] = max(asked.get(key, 0.0), _now())
            await asyncio.sleep(seconds)

    play(desk, story)
    for key, since in asked.items():
        assert desk.times(key), f"{key} was never looked at"
        assert max(desk.times(key)) >= since - 1e-9, f"nobody looked at {key} after it was added last"
    assert desk.most_at_once <= concurrency
    for key in (A, B, C):
        ends = [time for seen, time in desk.ends if seen == key]
        begins = desk.times(key)[1:]
        assert len(begins) <= len(calls)
        if "forget" not in {what for what, seen, _ in calls if seen == key}:
            assert all(begin - end >= settle - 1e-9 for begin, end in zip(begins, ends, strict=False))
    assert desk.queue.depth() == 0
