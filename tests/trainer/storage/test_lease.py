"""Two runs never write to one place: the second is refused, a dead one is waited for, a loser notices."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from finetune_api.outcome import Reason
from finetune_api.storage_uri import parse
from finetune_trainer.errors import JobError
from finetune_trainer.job_output import JobOutput
from finetune_trainer.storage import open_store
from finetune_trainer.storage.lease import (
    LEASE,
    LOOK_SECONDS,
    MARGIN_SECONDS,
    PATIENCE_SECONDS,
    RENEW_SECONDS,
    VALID_SECONDS,
    Holder,
    Lease,
    Seen,
)
from finetune_trainer.storage.s3_slot import S3Slot
from tests.s3_server import S3Server

AWAY = JobError(Reason.STORAGE_UNAVAILABLE, "The store is away: try again later.")


@dataclass
class World:
    """A slot, and the time, which goes on only when somebody waits."""

    uri: str = "s3://bucket/out/lease"
    seconds: float = 0.0
    store_clock_is_off: float = 0.0
    """Seconds by which the store's clock has jumped."""
    says_times: bool = True
    away: bool = False
    loses_answers: bool = False
    atomic: bool = True
    content: tuple[bytes, int, datetime] | None = None
    writes: int = 0
    said: list[str] = field(default_factory=list)
    alive: list[Lease] = field(default_factory=list)
    """Renewed in time."""

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        before, self.seconds = self.seconds, self.seconds + seconds
        if before // RENEW_SECONDS != self.seconds // RENEW_SECONDS:
            for lease in self.alive:
                lease.renew()

    def lease(self, name: str) -> Lease:
        """One more process that wants it."""
        holder = Holder(name, f"host-of-{name}", 7)
        return Lease(self, "s3://bucket/out", holder, clock=lambda: self.seconds, pause=self.pause, renewing=False)

    def taken(self, name: str) -> Lease:
        """The same, which has it."""
        lease = self.lease(name)
        lease.take(self.said.append)
        return lease

    def read(self) -> Seen | None:
        """As Slot says."""
        self._reached()
        if self.content is None:
            return None
        data, number, written = self.content
        return Seen(data, str(number), *((written, self._now()) if self.says_times else (None, None)))

    def put(self, data: bytes, *, replacing: str | None) -> str | None:
        """As Slot says."""
        self._reached()
        if self.atomic and replacing != (None if self.content is None else str(self.content[1])):
            return None
        self.writes += 1
        self.content = (data, self.writes, self._now())
        return None if self.loses_answers else str(self.writes)

    def remove(self, etag: str) -> None:
        """As Slot says."""
        self._reached()
        if self.content is not None and str(self.content[1]) == etag:
            self.content = None

    def _now(self) -> datetime:
        return datetime(2030, 1, 1, 12, tzinfo=UTC) + timedelta(seconds=self.seconds + self.store_clock_is_off)

    def _reached(self) -> None:
        if self.away:
            raise AWAY


def refused(world: World, name: str = "second") -> JobError:
    """What a process is told that gets no lease."""
    with pytest.raises(JobError) as caught:
        world.taken(name)
    return caught.value


def test_the_second_of_two_living_runs_is_refused_and_told_by_whom() -> None:
    world = World()
    world.alive.append(world.taken("first"))
    error = refused(world)
    assert error.reason is Reason.OUTPUT_CONFLICT
    assert "job first, process 7 on host-of-first, its lease ends at 12:01:" in error.message
    assert world.seconds <= RENEW_SECONDS + LOOK_SECONDS
    assert not world.alive[0].lost
    world.alive[0].check()


def test_a_run_that_was_killed_is_waited_for_with_one_line() -> None:
    world = World()
    killed = world.taken("first")
    began = world.seconds
    second = world.taken("second")
    assert VALID_SECONDS < world.seconds - began < VALID_SECONDS + 2 * LOOK_SECONDS
    (said,) = world.said
    assert "was in use by job first, process 7 on host-of-first, waiting until its lease ends at 12:01:15 UTC" in said
    # It was not dead but slept.
    with pytest.raises(JobError, match="job second") as caught:
        killed.check()
    assert caught.value.reason is Reason.OUTPUT_CONFLICT
    assert killed.lost
    killed.release()
    second.check()
    second.release()
    assert world.content is None


def test_what_ran_out_long_ago_is_taken_at_once() -> None:
    world = World()
    world.taken("first")
    world.seconds += 10_000
    began = world.seconds
    world.taken("second")
    assert world.seconds - began < LOOK_SECONDS
    assert world.said == []


def test_what_was_given_back_is_free() -> None:
    world = World()
    world.taken("first").release()
    began = world.seconds
    world.taken("second").check()
    assert world.seconds - began < LOOK_SECONDS


def test_the_loser_stops_at_its_next_renewal_and_never_takes_it_back() -> None:
    world = World()
    first = world.taken("first")
    world.taken("second")
    first.renew()
    assert first.lost
    content = world.content
    first.renew()
    first.release()
    assert world.content == content


@pytest.mark.parametrize("jump", [-86_400, -30, 30], ids=lambda jump: f"{jump} s")
def test_a_clock_of_the_store_that_jumps_neither_ends_nor_keeps_a_lease(jump: float) -> None:
    world = World()
    world.alive.append(world.taken("first"))
    world.store_clock_is_off = jump
    assert refused(world).reason is Reason.OUTPUT_CONFLICT
    world.alive.clear()
    world.store_clock_is_off += jump
    began = world.seconds
    world.taken("third").check()
    assert world.seconds - began <= PATIENCE_SECONDS


@pytest.mark.parametrize("alive", [True, False])
def test_a_store_that_says_no_times_is_watched(alive: bool) -> None:
    world = World(says_times=False)
    first = world.taken("first")
    if alive:
        world.alive.append(first)
        assert "its lease ends after 75 s" in refused(world).message
    else:
        world.taken("second").check()


def test_answers_that_get_lost_are_not_taken_for_another_holder() -> None:
    world = World(loses_answers=True)
    lease = world.taken("first")
    for _ in range(5):
        world.pause(RENEW_SECONDS)
        lease.renew()
        lease.check()
    assert not lease.lost


def test_of_two_that_write_at_once_where_nobody_decides_the_last_one_has_it() -> None:
    world = World(atomic=False)
    first, second = world.lease("first"), world.lease("second")

    def meanwhile(seconds: float) -> None:
        first._pause = world.pause
        world.put(second._content(), replacing=None)
        second.take(world.said.append)
        world.alive.append(second)
        world.pause(seconds)

    first._pause = meanwhile
    with pytest.raises(JobError, match="job second"):
        first.take(world.said.append)
    second.check()


def test_a_store_that_is_away_costs_the_lease_only_its_certainty() -> None:
    world = World()
    lease = world.taken("first")
    world.away = True
    for _ in range(2):
        world.pause(RENEW_SECONDS)
        lease.renew()
        lease.check()
    world.pause(VALID_SECONDS - MARGIN_SECONDS)
    with pytest.raises(JobError) as caught:
        lease.check()
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
    assert not lease.lost
    world.away = False
    lease.check()


def test_a_lease_that_somebody_removed_is_written_again() -> None:
    world = World()
    lease = world.taken("first")
    world.content = None
    lease.renew()
    lease.check()
    assert world.content is not None


def test_what_is_no_lease_is_waited_for_and_replaced() -> None:
    world = World()
    world.put(b"<html>", replacing=None)
    world.taken("first").check()
    assert "a process without a name" in world.said[0]


def output(uri: str) -> JobOutput:
    """An output as rank 0 of a run has it."""
    return JobOutput(open_store(uri), Path("/nowhere"), is_first=True, job="first", say=lambda _: None)


@pytest.fixture
def uri(s3_environment: S3Server) -> str:
    """An empty prefix."""
    return f"s3://{s3_environment.new_bucket()}/team/run"


def test_a_real_store_keeps_writers_apart(uri: str) -> None:
    held = output(uri)
    slot = S3Slot(parse(uri), LEASE)
    seen = slot.read()
    assert seen is not None
    assert seen.age_seconds is not None
    assert 0 <= seen.age_seconds < 30
    assert str(seen.holder()).startswith("job first, process ")
    held.store.write_bytes("a", b"1")
    # Another takes it over.
    other = Holder("other", "elsewhere", 1)
    assert slot.put(Lease(slot, uri, other)._content(), replacing=seen.etag)
    assert held._lease is not None
    held._lease.renew()
    assert held.lost
    for write in (
        held.check,
        lambda: held.store.write_bytes("a", b"2"),
        lambda: held.store.delete("a"),
        lambda: held.store.delete_tree(""),
    ):
        with pytest.raises(JobError, match="job other, process 1 on elsewhere") as caught:
            write()
        assert caught.value.reason is Reason.OUTPUT_CONFLICT
    assert held.store.read_bytes("a") == b"1"
    held.close()
    assert slot.read() is not None


def test_a_real_store_is_free_again_after_the_end(uri: str) -> None:
    for _ in range(2):
        run = output(uri)
        run.close()
        assert open_store(uri).list() == []


def test_conditions_hold_at_a_real_store(uri: str) -> None:
    slot = S3Slot(parse(uri), LEASE)
    assert slot.read() is None
    assert slot.put(b"0", replacing='"absent"') is None
    first = slot.put(b"1", replacing=None)
    assert first is not None
    assert slot.put(b"2", replacing=None) is None
    second = slot.put(b"2", replacing=first)
    assert second is not None
    assert slot.put(b"3", replacing=first) is None
    slot.remove(first)
    seen = slot.read()
    assert seen is not None
    assert (seen.data, seen.etag) == (b"2", second)
    slot.remove(second)
    assert slot.read() is None


def test_a_store_that_knows_no_conditions_is_written_to_plainly(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = S3Slot(parse(uri), LEASE)
    put = slot._connection.client.put_object

    def old(**arguments: str) -> object:
        if "IfMatch" in arguments or "IfNoneMatch" in arguments:
            raise ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
        return put(**arguments)  # type: ignore[arg-type]  # the types of what is passed on

    monkeypatch.setattr(slot._connection.client, "put_object", old)
    assert slot.put(b"1", replacing=None) is not None
    seen = slot.read()
    assert seen is not None
    assert seen.data == b"1"
