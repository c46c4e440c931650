"""No address gets more than its share of a port's places, and whoever holds most gives way when all are taken."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.serving.admission import Admission, Limits, Place

LIMITS = Limits(
    connections=4,
    connections_of_one=3,
    grace_seconds=1.0,
    fruitless_burst=10,
    fruitless_per_second=2.0,
    all_fruitless_burst=20,
    all_fruitless_per_second=5.0,
)


class Setting:
    """A port whose time is moved by hand, and the connections that are open."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.seconds = 100.0
        self.admission = Admission(limits, clock=lambda: self.seconds)
        self.open: list[Place] = []

    def connect(self, peer: str) -> Place | None:
        """A connection arrives; its place, or None when it was refused."""
        if not self.admission.admits(peer):
            return None
        place: Place | None = None

        def cut() -> None:
            assert place is not None
            self.open.remove(place)

        place = self.admission.enter(peer, cut)
        self.open.append(place)
        return place

    def close(self, place: Place) -> None:
        self.open.remove(place)
        self.admission.leave(place)

    def peers(self) -> Counter[str]:
        return Counter(place.peer for place in self.open)


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_an_address_has_so_many_connections_and_others_are_not_concerned(setting: Setting) -> None:
    assert [setting.connect("greedy") is None for _ in range(5)] == [False] * 3 + [True] * 2
    assert setting.connect("other") is not None


def test_a_connection_that_ends_makes_room_for_another_of_its_address(setting: Setting) -> None:
    places = [setting.connect("one") for _ in range(3)]
    assert setting.connect("one") is None
    assert places[0] is not None
    setting.close(places[0])
    assert setting.connect("one") is not None


def test_when_all_places_are_taken_the_oldest_of_whoever_has_most_gives_way(setting: Setting) -> None:
    alone = setting.connect("alone")
    first = setting.connect("greedy")
    setting.seconds += 0.5
    rest = [setting.connect("greedy") for _ in range(2)]
    setting.seconds += 1.0
    newcomer = setting.connect("newcomer")
    assert first not in setting.open
    assert {alone, newcomer, *rest} == set(setting.open)
    assert len(setting.admission) == 4


def test_nobody_gives_way_before_a_second_is_over_and_the_others_wait_for_that(setting: Setting) -> None:
    for peer in ("a", "b", "c", "d"):
        setting.connect(peer)
    setting.seconds += 0.25
    assert setting.admission.wait_seconds() == 0.75
    setting.close(setting.open[0])
    assert setting.admission.wait_seconds() == 0
    setting.connect("e")
    setting.seconds += 0.75
    assert setting.admission.wait_seconds() == 0


def test_whoever_has_most_keeps_what_was_not_left_alone_long_enough(setting: Setting) -> None:
    old = setting.connect("alone")
    setting.seconds += 1.0
    for _ in range(3):
        setting.connect("greedy")
    setting.connect("newcomer")
    assert old not in setting.open
    assert setting.peers() == {"greedy": 3, "newcomer": 1}


def test_connections_that_lead_to_nothing_are_limited_however_short_they_are(setting: Setting) -> None:
    def tries(peer: str) -> int:
        done = 0
        for _ in range(100):
            place = setting.connect(peer)
            if place is not None:
                done += 1
                setting.close(place)
        return done

    assert tries("scanner") == 10
    assert tries("other") == 10
    setting.seconds += 3
    assert tries("scanner") == 6


def test_connections_that_lead_to_something_are_not_limited(setting: Setting) -> None:
    for _ in range(1000):
        place = setting.connect("trainer")
        assert place is not None
        setting.admission.fruitful("trainer")
        setting.close(place)
    assert setting.admission.wait_seconds() == 0


def test_too_many_fruitless_ones_of_all_addresses_make_everybody_wait(setting: Setting) -> None:
    for number in range(20):
        assert setting.admission.wait_seconds() == 0
        place = setting.connect(f"pod-{number}")
        assert place is not None
        setting.close(place)
    assert setting.admission.wait_seconds() == pytest.approx(0.2)
    setting.seconds += 0.2
    assert setting.admission.wait_seconds() == 0


def test_whoever_waits_for_room_goes_on_when_a_connection_ends() -> None:
    async def run() -> None:
        # By this clock no time passes: only a connection that ends can make room.
        setting = Setting()
        for peer in ("a", "b", "c", "d"):
            setting.connect(peer)
        waiting = asyncio.create_task(setting.admission.room())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        setting.close(setting.open[0])
        await asyncio.wait_for(waiting, 60)

    asyncio.run(run())


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["connect", "close", "wait"]), st.sampled_from("abcdef"), st.floats(0, 2)), max_size=60
)


@given(OPERATIONS)
def test_whatever_happens_no_limit_is_exceeded_and_every_place_is_accounted_for(
    operations: list[tuple[str, str, float]],
) -> None:
    setting = Setting(Limits(connections=4, connections_of_one=2, fruitless_burst=1000, all_fruitless_burst=1000))
    for kind, peer, seconds in operations:
        if kind == "connect" and setting.admission.wait_seconds() == 0:
            fewest = not setting.peers()[peer]
            assert (setting.connect(peer) is not None) or not fewest
        elif kind == "close" and setting.open:
            setting.close(setting.open[0])
        else:
            setting.seconds += seconds
        assert len(setting.admission) == len(setting.open) <= 4
        assert max(setting.peers().values(), default=0) <= 2
    for place in list(setting.open):
        setting.close(place)
    assert len(setting.admission) == 0
    assert setting.admission.wait_seconds() == 0
