"""Events are told behind the reconciles, in order, and never hold anything up for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator import events as events_module
from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError, api_error
from finetune_operator.events import JOB_BURST, JOB_PER_SECOND, MESSAGE_LIMIT, QUEUE_LIMIT, TRIES, EventBroadcaster
from finetune_operator.policy.transitions import Event
from finetune_operator.wire import Raw, Wire

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
JOB: Raw = {
    "apiVersion": "finetune.io/v1",
    "kind": "FineTuneJob",
    "metadata": {"name": "guard", "namespace": "team", "uid": "7", "resourceVersion": "1"},
}


class EventWire(Wire):
    """Takes events, one at a time."""

    def __init__(self) -> None:
        self.taken: list[Mapping[str, Any]] = []
        self.errors: list[ApiError] = []
        self.open = asyncio.Event()
        self.open.set()
        self.at_once = self.most_at_once = 0

    async def request(self, method: str, path: str, **more: Any) -> Raw:
        """As Wire's."""
        assert (method, path) == ("POST", "api/v1/namespaces/team/events")
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self.open.wait()
        await asyncio.sleep(0)
        self.at_once -= 1
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(more["body"])
        return {"metadata": {}}


def job(name: str = "guard") -> Raw:
    return {**JOB, "metadata": {**JOB["metadata"], "name": name, "uid": f"uid of {name}"}}


def numbered(*numbers: int) -> list[Event]:
    return [Event("Normal", "Retrying", f"number {number}") for number in numbers]


async def broadcast(broadcaster: EventBroadcaster, *records: tuple[Raw, list[Event]]) -> None:
    """Record all of that, at once for every job, and post it."""
    async with asyncio.TaskGroup() as tasks:
        run = tasks.create_task(broadcaster.run())
        async with asyncio.TaskGroup() as reconciles:
            for about, events in records:
                reconciles.create_task(broadcaster.record(about, events, NOW))
        await broadcaster.flush()
        run.cancel()


def posted(*records: tuple[Raw, list[Event]], errors: Sequence[ApiError] = ()) -> list[Mapping[str, Any]]:
    """What the API server has taken."""

    async def run() -> list[Mapping[str, Any]]:
        wire = EventWire()
        wire.errors += errors
        broadcaster = EventBroadcaster(Cluster(wire))
        await broadcast(broadcaster, *records)
        assert broadcaster.waiting() == 0
        assert wire.most_at_once == 1
        return wire.taken

    return asyncio.run(run())


def messages(taken: list[Mapping[str, Any]], name: str = "guard") -> list[str]:
    return [body["message"] for body in taken if body["involvedObject"]["name"] == name]


def test_events_of_a_job_come_in_their_order_however_many_wait() -> None:
    count = JOB_BURST
    names = [f"job-{number}" for number in range(QUEUE_LIMIT // count + 5)]
    taken = posted(*((job(name), numbered(*range(count))) for name in names))
    for name in names:
        assert messages(taken, name) == [f"number {number}" for number in range(count)]


def test_one_that_is_refused_is_logged_and_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    refused = api_error(403, "Forbidden", "The API server refuses it.")
    assert messages(posted((JOB, numbered(1, 2, 3)), errors=[refused])) == ["number 2", "number 3"]
    assert "Event Retrying of team/guard could not be posted: " in caplog.text
    assert "refuses it" in caplog.text


@pytest.mark.parametrize("times", [1, TRIES - 1, TRIES])
def test_a_server_that_asks_for_a_moment_gets_it(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MOMENT_SECONDS", 0.001)
    busy = [api_error(429, "TooManyRequests", "The API server is busy.", 3600.0)] * times
    expected = ["number 1", "number 2"] if times < TRIES else ["number 2"]
    assert messages(posted((JOB, numbered(1, 2)), errors=busy)) == expected


def test_an_end_waits_for_events_only_so_long_and_says_what_was_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events_module, "FLUSH_SECONDS", 0.01)

    async def run() -> None:
        wire = EventWire()
        wire.open.clear()
        await broadcast(EventBroadcaster(Cluster(wire)), (JOB, numbered(1, 2, 3)))
        assert not wire.taken

    asyncio.run(run())
    assert "2 events were not posted" in caplog.text


def test_who_records_more_than_can_be_posted_waits_for_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events_module, "QUEUE_LIMIT", 3)
    monkeypatch.setattr(events_module, "PATIENCE_SECONDS", 0.01)

    async def run() -> None:
        broadcaster = EventBroadcaster(Cluster(EventWire()))
        await broadcaster.record(JOB, numbered(1, 2, 3), NOW)
        assert not caplog.records
        await broadcaster.record(JOB, numbered(4, 5), NOW)
        assert broadcaster.waiting() == 3

    asyncio.run(run())
    assert caplog.text.count("team/guard could not be posted: 3 others wait") == 2


def test_a_job_that_is_edited_all_the_time_leaves_room_for_others(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        wire, seconds = EventWire(), [0.0]
        broadcaster = EventBroadcaster(Cluster(wire), clock=lambda: seconds[0])
        await broadcast(broadcaster, (JOB, numbered(*range(1000))), (job("other"), numbered(1)))
        assert len(messages(wire.taken)) == JOB_BURST
        assert messages(wire.taken, "other") == ["number 1"]
        seconds[0] += 1 / JOB_PER_SECOND
        await broadcast(broadcaster, (JOB, numbered(7, 8)))
        assert messages(wire.taken)[JOB_BURST:] == ["number 7"]
        assert caplog.text.count("Events of team/guard were left out") == 1

    asyncio.run(run())


def test_an_event_says_what_it_is_about_and_fits() -> None:
    (event,) = posted((JOB, [Event("Warning", "Failed", "x" * 5000)]))
    assert event["involvedObject"] == {
        "apiVersion": "finetune.io/v1",
        "kind": "FineTuneJob",
        "name": "guard",
        "namespace": "team",
        "uid": "7",
        "resourceVersion": "1",
    }
    assert (event["type"], event["reason"], event["firstTimestamp"]) == ("Warning", "Failed", "2026-01-31T12:00:00Z")
    assert len(event["message"]) == MESSAGE_LIMIT
    assert event["message"].endswith("…")
