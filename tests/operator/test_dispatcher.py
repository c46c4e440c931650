"""Which events and list entries lead to a look, and when: a thousand finished jobs must cost nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_operator.memory import Memory
from finetune_operator.policy.times import rfc3339
from finetune_operator.queue import Key
from finetune_operator.resync import Dispatcher, child_ended

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
KEY = Key("team", "guard")


class Wishes:
    """A queue that only writes down what is wished for."""

    def __init__(self) -> None:
        self.looks: list[tuple[Key, float, bool]] = []

    def add(self, key: Key, *, after_seconds: float = 0.0, first: bool = False) -> None:
        """As WorkQueue's."""
        self.looks.append((key, after_seconds, first))


class Stage:
    """A dispatcher and what it wished for."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.queue = Wishes()
        self.dispatcher = Dispatcher(self.queue, self.memory, now=lambda: NOW)  # type: ignore[arg-type]


def job(status: dict[str, Any] | None = None, version: str = "7", **spec: Any) -> dict[str, Any]:
    """A FineTuneJob as an event shows it."""
    metadata = {"namespace": "team", "name": "guard", "uid": "u", "resourceVersion": version, "generation": 1}
    return {"metadata": metadata, "spec": spec, "status": status or {}}


VERIFY = {"verify": True}


def finished(ago: float = 0, generation: int = 1, verified: str = "") -> dict[str, Any]:
    """Status of a job that has ended so many seconds ago; `verified` is the reason of that condition."""
    time = rfc3339(NOW - timedelta(seconds=ago))
    conditions = [{"type": "Succeeded", "status": "True", "reason": "Succeeded", "lastTransitionTime": time}]
    if verified:
        conditions.append({"type": "Verified", "status": "Unknown", "reason": verified, "lastTransitionTime": time})
    return {
        "phase": "Succeeded",
        "observedGeneration": generation,
        "completionTime": time,
        "conditions": conditions,
    }


@pytest.mark.parametrize(
    ("raw", "looks"),
    [
        (job(), [(KEY, 0.0, True)]),
        (job({"phase": "Running", "observedGeneration": 1}), [(KEY, 0.0, False)]),
        (job(finished()), []),
        (job(finished(generation=0)), [(KEY, 0.0, False)]),
        (job(finished(ago=10), ttlSecondsAfterFinished=60), [(KEY, 50.0, False)]),
        (job(finished(ago=90), ttlSecondsAfterFinished=60), [(KEY, 0.0, False)]),
        (job(finished(), output=VERIFY), [(KEY, 0.0, False)]),
        (job(finished(verified="Verifying"), output=VERIFY, ttlSecondsAfterFinished=60), [(KEY, 0.0, False)]),
        (job(finished(verified="VerificationFailed"), output=VERIFY), []),
        (job(finished(verified="VerificationFailed"), output=VERIFY, ttlSecondsAfterFinished=60), [(KEY, 60.0, False)]),
        (job(finished(), output={"verify": False}), []),
    ],
)
def test_a_job_is_looked_at_when_there_is_something_to_do(raw: dict[str, Any], looks: list[Any]) -> None:
    stage = Stage()
    stage.dispatcher.job_seen(raw)
    assert stage.queue.looks == looks


def test_the_echo_of_our_own_write_is_no_news_but_a_list_is() -> None:
    stage = Stage()
    raw = job({"phase": "Running", "observedGeneration": 1})
    stage.memory.job(raw).written_version = "7"
    stage.dispatcher.job_seen(raw)
    assert stage.queue.looks == []
    stage.dispatcher.job_listed(raw)
    assert stage.queue.looks == [(KEY, 0.0, False)]


@pytest.mark.parametrize(
    ("known", "ended", "looked_at"),
    [
        ("nobody", True, False),
        ("nobody", False, True),
        ("running", True, True),
        ("running", False, True),
        ("finished", True, False),
        ("verifying", True, True),
        ("finished", False, True),
        ("settled", False, False),
    ],
)
def test_a_child_is_news_unless_all_is_over(known: str, ended: bool, looked_at: bool) -> None:
    stage = Stage()
    if known != "nobody":
        found = stage.memory.job(job())
        output = VERIFY if known == "verifying" else {}
        stage.dispatcher.job_seen(job(finished() if known != "running" else {"phase": "Running"}, output=output))
        found.settled = known == "settled"
        stage.queue.looks.clear()
    stage.dispatcher.child_seen("team", "guard", ended=ended)
    assert bool(stage.queue.looks) is looked_at


@pytest.mark.parametrize(
    ("status", "over"),
    [
        ({}, False),
        ({"phase": "Running"}, False),
        ({"phase": "Failed"}, True),
        ({"conditions": [{"type": "Created"}, {"type": "Running"}]}, False),
        ({"conditions": [{"type": "Created"}, {"type": "Succeeded"}]}, True),
        ({"conditions": None}, False),
    ],
)
def test_pods_and_pytorchjobs_end_alike(status: dict[str, Any], over: bool) -> None:
    assert child_ended({"status": status}) is over


def test_another_job_of_the_same_name_is_another_job() -> None:
    memory = Memory()
    first = memory.job(job())
    first.attempt, first.workers_uid = 3, "w"
    raw = job()
    assert memory.job(raw) is first
    assert memory.current_attempt("team", "guard", "u") == (3, "w")
    raw["metadata"]["uid"] = "other"
    assert memory.job(raw) is not first
    assert memory.current_attempt("team", "guard", "u") is None
