"""Turns are taken by so many at a time, in rounds, and none is lost with a client that stops waiting."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.progress.turns import Turns


class Setting:
    """Clients that take turns and keep them until they are told to end."""

    def __init__(self, at_once: int) -> None:
        self.turns = Turns(at_once)
        self.served: list[str] = []
        self.ends: dict[asyncio.Task[None], asyncio.Event] = {}
        self.has_turn: set[asyncio.Task[None]] = set()

    def arrive(self, client: str) -> asyncio.Task[None]:
        end = asyncio.Event()

        async def take() -> None:
            task = asyncio.current_task()
            assert task is not None
            async with self.turns.turn(client):
                self.served.append(client)
                self.has_turn.add(task)
                try:
                    await end.wait()
                finally:
                    self.has_turn.remove(task)

        task = asyncio.create_task(take())
        self.ends[task] = end
        return task

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def end_all(self) -> None:
        for end in self.ends.values():
            end.set()
        await asyncio.gather(*self.ends, return_exceptions=True)


def test_clients_are_served_in_rounds() -> None:
    async def run() -> list[str]:
        setting = Setting(1)
        for client in ("a", "a", "a", "a", "b", "c", "b"):
            setting.arrive(client)
        await setting.settle()
        assert setting.served == ["a"]
        await setting.end_all()
        return setting.served

    assert asyncio.run(run()) == ["a", "a", "b", "c", "a", "b", "a"]


def test_a_turn_that_comes_just_when_a_client_gives_up_goes_to_the_next() -> None:
    async def run() -> None:
        setting = Setting(1)
        first, second, third = (setting.arrive(client) for client in "abc")
        await setting.settle()
        setting.ends[first].set()
        # Now the first has ended, and its turn is the second's, which has not gone on yet.
        await asyncio.sleep(0)
        second.cancel()
        await setting.settle()
        assert setting.has_turn == {third}
        await setting.end_all()

    asyncio.run(run())


def test_a_client_that_gives_up_while_it_waits_is_passed_over() -> None:
    async def run() -> list[str]:
        setting = Setting(1)
        first, *waiting = (setting.arrive(client) for client in "abbc")
        await setting.settle()
        for task in waiting[:2]:
            task.cancel()
        await setting.settle()
        setting.ends[first].set()
        await setting.settle()
        assert setting.has_turn == {waiting[2]}
        await setting.end_all()
        return setting.served

    assert asyncio.run(run()) == ["a", "c"]


@given(
    at_once=st.integers(1, 3),
    steps=st.lists(
        st.tuples(st.sampled_from(["arrive", "arrive", "end", "cancel"]), st.integers(0, 9), st.integers(0, 2)),
        max_size=40,
    ),
)
def test_whoever_comes_and_goes_turns_are_never_too_many_nor_lost(
    at_once: int, steps: list[tuple[str, int, int]]
) -> None:
    async def run() -> None:
        setting = Setting(at_once)
        for kind, number, pause in steps:
            tasks = [task for task in setting.ends if not task.done()]
            if kind == "arrive":
                setting.arrive("abc"[number % 3])
            elif kind == "end" and tasks:
                setting.ends[tasks[number % len(tasks)]].set()
            elif kind == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            for _ in range(pause):
                await asyncio.sleep(0)
            assert len(setting.has_turn) <= at_once
        await setting.settle()
        unfinished = [task for task in setting.ends if not task.done()]
        assert len(setting.has_turn) == min(at_once, len(unfinished))
        await setting.end_all()
        # All turns are free again.
        setting = _again(setting)
        for client in "abc":
            setting.arrive(client)
        await setting.settle()
        assert len(setting.has_turn) == at_once
        assert Counter(setting.served) == Counter("abc"[:at_once])
        await setting.end_all()

    asyncio.run(run())


def _again(setting: Setting) -> Setting:
    """The same turns, and nobody there."""
    fresh = Setting(1)
    fresh.turns = setting.turns
    return fresh
