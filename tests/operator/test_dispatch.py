"""Which events lead to a reconcile, and when: a thousand finished jobs must cost nothing."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.cache import Cache
from finetune_operator.dispatch import Dispatcher
from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.queue import Key
from finetune_operator.serving.health import Heartbeat
from tests.operator.raw import KEY, NOW, child, controlled, finished, job, pod, pytorch_job

VERIFY = {"verify": True}
VERIFIER = controlled(child("guard-verify", attempt="", status={"phase": "Running"}), "guard-job-uid-verify", "Job")
FAILED = pytorch_job(conditions=[{"type": "Failed", "status": "True"}])


class NotedQueue:
    """A queue that only writes down what is asked for."""

    def __init__(self) -> None:
        self.added: list[tuple[Key, float]] = []
        self.forgotten: list[Key] = []

    def add(self, key: Key, *, after_seconds: float = 0.0) -> None:
        """As WorkQueue's."""
        self.added.append((key, after_seconds))

    def forget(self, key: Key) -> None:
        """As WorkQueue's."""
        self.forgotten.append(key)


class Stage:
    """A dispatcher and what it asked for."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.cache.synced = True
        self.queue = NotedQueue()
        self.forgotten: list[Key] = []
        self.dispatcher = Dispatcher(
            self.queue,  # type: ignore[arg-type]
            self.cache,
            Heartbeat(300),
            forget=self.forgotten.append,
            now=lambda: NOW,
        )

    def sees(self, kind: str, raw: dict[str, Any], *, deleted: bool = False) -> list[tuple[Key, float]]:
        """What is asked for because of one event."""
        self.queue.added.clear()
        self.dispatcher.seen(kind, raw, deleted)
        return list(self.queue.added)


@pytest.mark.parametrize(
    ("raw", "added"),
    [
        (job(), [(KEY, 0.0)]),
        (job({"phase": "Running", "observedGeneration": 1}), [(KEY, 0.0)]),
        (job(finished()), []),
        (job(finished(generation=0)), [(KEY, 0.0)]),
        (job(finished(ago=10), ttlSecondsAfterFinished=60), [(KEY, 50.0)]),
        (job(finished(ago=90), ttlSecondsAfterFinished=60), [(KEY, 0.0)]),
        (job(finished(), output=VERIFY), [(KEY, 0.0)]),
        (job(finished(verified="Verifying"), output=VERIFY, ttlSecondsAfterFinished=60), [(KEY, 0.0)]),
        (job(finished(verified="VerificationFailed"), output=VERIFY), []),
        (job(finished(verified="VerificationFailed"), output=VERIFY, ttlSecondsAfterFinished=60), [(KEY, 60.0)]),
        (job(finished(), output={"verify": False}), []),
    ],
)
def test_a_job_is_reconciled_when_there_is_something_to_do(raw: dict[str, Any], added: list[Any]) -> None:
    assert Stage().sees(FINETUNE_PLURAL, raw) == added


def test_until_everything_was_listed_once_a_job_with_an_attempt_waits() -> None:
    stage = Stage()
    stage.cache.synced = False
    assert stage.sees(FINETUNE_PLURAL, job({"phase": "Running", "attempt": 1})) == []
    assert stage.sees(PODS_PLURAL, pod()) == []
    assert list(stage.cache.unfinished()) == [KEY]
    new = job()
    new["metadata"] |= {"name": "new", "uid": "new"}
    assert stage.sees(FINETUNE_PLURAL, new) == [(Key("team", "new"), 0.0)]
    ended = job(finished(), output=VERIFY)
    ended["metadata"] |= {"name": "ended", "uid": "ended"}
    assert stage.sees(FINETUNE_PLURAL, ended) == [(Key("team", "ended"), 0.0)]


def test_an_ended_job_that_is_edited_while_the_operator_starts_is_reconciled() -> None:
    """What was ended by the time it was listed is not looked at when everything was."""
    stage = Stage()
    stage.cache.synced = False
    ended = {"attempt": 1, **finished()}
    assert stage.sees(FINETUNE_PLURAL, job(ended, version="7")) == []
    edited = job(ended, version="8")
    edited["metadata"]["generation"] = 2
    assert stage.sees(FINETUNE_PLURAL, edited) == [(KEY, 0.0)]


def test_the_echo_of_our_own_write_and_what_is_older_are_no_news() -> None:
    stage = Stage()
    running = {"phase": "Running", "observedGeneration": 1}
    stage.sees(FINETUNE_PLURAL, job(running))
    found = stage.cache.find(KEY)
    assert found is not None
    found.version = "9"  # we wrote
    assert stage.sees(FINETUNE_PLURAL, job(running, version="9")) == []
    assert stage.sees(FINETUNE_PLURAL, job(running, version="8")) == []
    assert stage.sees(FINETUNE_PLURAL, job(running, version="10")) == [(KEY, 0.0)]


def test_a_job_that_is_being_deleted_is_reconciled_though_it_has_ended() -> None:
    raw = job(finished())
    raw["metadata"]["deletionTimestamp"] = "2026-01-31T12:00:00Z"
    assert Stage().sees(FINETUNE_PLURAL, raw) == [(KEY, 0.0)]


def test_a_deleted_job_is_forgotten_and_the_late_news_of_an_earlier_one_is_not_about_it() -> None:
    stage = Stage()
    stage.sees(FINETUNE_PLURAL, job())
    earlier = job()
    earlier["metadata"]["uid"] = "earlier"
    stage.sees(FINETUNE_PLURAL, earlier, deleted=True)
    assert stage.forgotten == stage.queue.forgotten == []
    stage.sees(FINETUNE_PLURAL, job(), deleted=True)
    assert stage.forgotten == stage.queue.forgotten == [KEY]


@pytest.mark.parametrize(
    ("known", "kind", "raw", "deleted", "news"),
    [
        ("nobody", PODS_PLURAL, pod(), False, False),
        ("running", PODS_PLURAL, pod(), False, True),
        ("running", PODS_PLURAL, pod(), True, True),
        ("running", PYTORCH_PLURAL, pytorch_job(), False, True),
        ("running", PYTORCH_PLURAL, FAILED, False, True),
        ("finished", PODS_PLURAL, pod(), False, True),
        ("finished", PODS_PLURAL, pod(), True, False),
        ("finished", PYTORCH_PLURAL, pytorch_job(), False, True),
        ("finished", PYTORCH_PLURAL, FAILED, False, False),
        ("finished", PYTORCH_PLURAL, pytorch_job(), True, False),
        ("verifying", PODS_PLURAL, VERIFIER, False, True),
        ("verifying", PODS_PLURAL, VERIFIER, True, True),
        ("done", PODS_PLURAL, pod(), False, False),
        ("done", PYTORCH_PLURAL, pytorch_job(), False, False),
    ],
)
def test_a_child_is_news_unless_all_is_over(
    known: str, kind: str, raw: dict[str, Any], deleted: bool, news: bool
) -> None:
    stage = Stage()
    if known != "nobody":
        output = VERIFY if known == "verifying" else {}
        stage.sees(FINETUNE_PLURAL, job(finished() if known != "running" else {"phase": "Running"}, output=output))
        found = stage.cache.find(KEY)
        assert found is not None
        found.done = known == "done"
    assert stage.sees(kind, raw, deleted=deleted) == ([(KEY, 0.0)] if news else [])


@pytest.mark.parametrize("first", ["job", "child"])
def test_machines_that_a_finished_job_still_holds_are_noticed_in_whatever_order_they_are_seen(first: str) -> None:
    stage = Stage()
    events = [(FINETUNE_PLURAL, job(finished())), (PODS_PLURAL, pod())]
    added = [stage.sees(*event) for event in (events if first == "job" else reversed(events))]
    assert added == [[], [(KEY, 0.0)]]


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"finetune.dev/job-name": "", "finetune.dev/job-uid": "job-uid"},
        {"finetune.dev/job-name": "guard", "finetune.dev/job-uid": "another"},
        {"finetune.dev/job-name": "nobody", "finetune.dev/job-uid": "none", "finetune.dev/attempt": "many"},
    ],
)
def test_what_wears_our_labels_wrongly_is_nobodys(labels: dict[str, str]) -> None:
    stage = Stage()
    stage.sees(FINETUNE_PLURAL, job({"phase": "Running"}))
    foreign = pod()
    foreign["metadata"]["labels"] = labels
    assert stage.sees(PODS_PLURAL, foreign) == []
    assert stage.sees(PODS_PLURAL, foreign, deleted=True) == []
