"""Ranks that wait for one another: for as long as it takes, but for nobody who failed or vanished."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from datetime import timedelta

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not listed

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.train.meetings import WAIT_LIMIT, Meetings


class Waiting:
    """Rank 1 of two on one node, with a clock that only its own pauses move.

    Args:
        meanwhile: called in each pause with the seconds that have passed.
    """

    def __init__(self, store: HashStore, meanwhile: Callable[[float], None], *, first: int | None = None) -> None:
        self.now = 0.0
        self._meanwhile = meanwhile
        self.meetings = Meetings(
            store,
            rank=1,
            processes={0: first or os.getpid(), 1: os.getpid()},
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self._meanwhile(self.now)


def rank_0(store: HashStore) -> Meetings:
    return Meetings(store, rank=0, processes={0: os.getpid(), 1: os.getpid()})


def gone() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def nothing(_: float) -> None:
    pass


def test_who_waits_for_hours_goes_on_within_a_second_of_the_other_s_end() -> None:
    store = HashStore()
    other = rank_0(store)
    late = 5 * 3600.0

    def meanwhile(now: float) -> None:
        if now >= late and not store.check(["meeting-0"]):
            other.meet(comes=True, expected=1)

    waiting = Waiting(store, meanwhile)
    waiting.meetings.meet(comes=False, expected=1)
    assert late <= waiting.now < late + 1


def test_a_short_wait_is_noticed_at_once() -> None:
    store = HashStore()
    other = rank_0(store)
    waiting = Waiting(store, lambda now: other.meet(comes=True, expected=1) if now > 0.01 else None)
    waiting.meetings.meet(comes=False, expected=1)
    assert waiting.now < 0.02


def test_everybody_has_to_come_where_everybody_is_expected() -> None:
    store = HashStore()
    late = Waiting(store, nothing)
    came = Waiting(store, lambda now: late.meetings.meet(comes=True, expected=2) if now > 1 else None)
    came.meetings.meet(comes=True, expected=2)
    assert came.now > 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (JobError(Reason.DATA_INVALID, "train.jsonl:3 is no JSON."), "rank 0 failed: train.jsonl:3 is no JSON."),
        (ValueError("bad"), "rank 0 failed: ValueError: bad"),
        (KeyboardInterrupt(), "rank 0 failed: KeyboardInterrupt"),
    ],
)
def test_who_waits_learns_of_a_failure_and_is_not_its_cause(error: BaseException, words: str) -> None:
    store = HashStore()
    other = rank_0(store)

    def fail(_: float) -> None:
        if not store.check(["failed"]):
            with pytest.raises(type(error)), other.telling():
                raise error

    waiting = Waiting(store, fail)
    with pytest.raises(JobError) as caught:
        waiting.meetings.meet(comes=False, expected=1)
    assert caught.value.reason is Reason.PEER_FAILED
    assert words in caught.value.message


def test_the_first_failure_is_the_one_that_is_told() -> None:
    store = HashStore()
    other = rank_0(store)
    with pytest.raises(ValueError, match="cause"), other.telling():
        raise ValueError("cause")
    waiting = Waiting(store, nothing)
    with pytest.raises(JobError), waiting.meetings.telling():
        waiting.meetings.meet(comes=False, expected=1)
    with pytest.raises(JobError, match="rank 0 failed: ValueError: cause"):
        waiting.meetings.meet(comes=False, expected=1)


def test_nobody_waits_for_a_rank_that_vanished() -> None:
    waiting = Waiting(HashStore(), nothing, first=gone())
    with pytest.raises(JobError, match="rank 0 vanished") as caught:
        waiting.meetings.meet(comes=False, expected=1)
    assert caught.value.reason is Reason.PEER_FAILED
    assert waiting.now < 1


class LateStore(HashStore):
    """Rank 0 comes to the meeting, and ends, between the first look for it and the second."""

    def __init__(self) -> None:
        super().__init__()
        self._looks = 0

    def check(self, keys: list[str]) -> bool:
        if keys == ["meeting-0"]:
            self._looks += 1
            return self._looks > 1
        return super().check(keys)


def test_a_rank_that_came_and_then_ended_did_not_vanish() -> None:
    Waiting(LateStore(), nothing, first=gone()).meetings.meet(comes=False, expected=1)


def test_a_rank_that_hangs_is_given_up_in_the_end() -> None:
    waiting = Waiting(HashStore(), nothing)
    with pytest.raises(JobError, match="waited 12 hours for the others"):
        waiting.meetings.meet(comes=False, expected=1)
    assert timedelta(seconds=waiting.now) >= WAIT_LIMIT
