"""The API server refuses, stutters, answers in riddles or not at all: jobs live and end as ever."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from tests.cluster.api import Api, ApiError, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, success
from tests.faults.conftest import UnluckyOperator
from tests.faults.fault_table import ALL_FAULTS
from tests.faults.faults import ANSWERS, Fate, Refusal
from tests.faults.injection import Fault, Injection, anything, asks, writes_status
from tests.faults.stories import STORIES
from tests.faults.theatre import Theatre

WEBHOOK = 'Internal error occurred: failed calling webhook "validator.pytorchjob.training-operator.kubeflow.org"'
ALWAYS = 99
GETS_JOB, GETS_CHILD, GETS_POD = asks("get", "finetunejobs"), asks("get", "pytorchjobs"), asks("get", "pods")
MAKES_CONFIG, MAKES_CHILD, MAKES_EVENT = (asks("create", kind) for kind in ("configmaps", "pytorchjobs", "events"))
DELETES = asks("delete", "pytorchjobs")
BUSY = Refusal(429, retry_after=1)

FAULTS: Mapping[str, Fault] = {
    "everything-503": Fault(anything, Refusal(503), 5),
    "everything-503-html": Fault(anything, Refusal(503, body=b"<html>Service Unavailable</html>"), 3),
    "everything-403": Fault(anything, Refusal(403, "is forbidden: not yet"), 5),
    "everything-401": Fault(anything, Refusal(401), 3),
    "everything-504": Fault(anything, Refusal(504), 3),
    "everything-409": Fault(anything, Refusal(409), 3),
    "everything-422": Fault(anything, Refusal(422), 3),
    "everything-429": Fault(anything, BUSY, 2),
    "everything-418": Fault(anything, Refusal(418), 3),
    "everything-lost": Fault(anything, Fate.DROP, 5),
    "get-silent": Fault(GETS_CHILD, Fate.HOLD),
    "get-stalled": Fault(GETS_JOB, Fate.STALL),
    "config-429": Fault(MAKES_CONFIG, BUSY, 2),
    "config-403": Fault(MAKES_CONFIG, Refusal(403, "is forbidden: not yet"), 3),
    "config-409": Fault(MAKES_CONFIG, Refusal(409), 2),
    "config-422": Fault(MAKES_CONFIG, Refusal(422), 2),
    "config-silent": Fault(MAKES_CONFIG, Fate.HOLD, done=True),
    "create-429": Fault(MAKES_CHILD, BUSY, 2),
    "create-429-0": Fault(MAKES_CHILD, Refusal(429, retry_after=0), 5),
    "create-429-date": Fault(MAKES_CHILD, Refusal(429, retry_after="Fri, 31 Jan 2031 23:59:59 GMT"), 2),
    "create-409": Fault(MAKES_CHILD, Refusal(409), 2),
    "create-500": Fault(MAKES_CHILD, Refusal(500), 4),
    "create-webhook": Fault(MAKES_CHILD, Refusal(500, WEBHOOK), 3),
    "create-403": Fault(MAKES_CHILD, Refusal(403, "is forbidden: not yet"), 3),
    "create-404": Fault(MAKES_CHILD, Refusal(404), 2),
    "create-422": Fault(MAKES_CHILD, Refusal(422), 2),
    "create-silent": Fault(MAKES_CHILD, Fate.HOLD, done=True),
    "create-never-came": Fault(MAKES_CHILD, Fate.HOLD),
    "status-409": Fault(writes_status, Refusal(409), 10),
    "status-429": Fault(writes_status, BUSY, 2),
    "status-422": Fault(writes_status, Refusal(422), 3),
    "status-500": Fault(writes_status, Refusal(500), 4),
    "status-silent": Fault(writes_status, Fate.HOLD, done=True),
    "status-stalled": Fault(writes_status, Fate.STALL),
    "delete-404": Fault(DELETES, Refusal(404), 1),
    "delete-409": Fault(DELETES, Refusal(409), 3),
    "delete-422": Fault(DELETES, Refusal(422), 2),
    "delete-500": Fault(DELETES, Refusal(500), 3),
    "delete-silent": Fault(DELETES, Fate.HOLD, done=True),
    "event-500": Fault(MAKES_EVENT, Refusal(500), ALWAYS),
    "event-403": Fault(MAKES_EVENT, Refusal(403), ALWAYS),
    "event-silent": Fault(MAKES_EVENT, Fate.HOLD),
}
"""Name of a job -> what goes wrong with the requests about it."""

READ = {
    "job": GETS_JOB,
    "pytorchjob": GETS_CHILD,
    "pod": GETS_POD,
    "config-made": MAKES_CONFIG,
    "pytorchjob-made": MAKES_CHILD,
    "status-written": writes_status,
    "pytorchjob-deleted": DELETES,
    "event-made": MAKES_EVENT,
}
"""Answers that the operator reads."""

NO_RIGHT = Refusal(403, 'jobs.batch is forbidden: User "finetune-operator" cannot do that')
FAULTS_OF_VERIFICATIONS: Mapping[str, Fault] = {
    "verify-none": Fault(lambda call: call.resource == "jobs", NO_RIGHT, 6),
    "verify-get-403": Fault(asks("get", "jobs"), NO_RIGHT, 4),
    "verify-create-403": Fault(asks("create", "jobs"), NO_RIGHT, 3),
    "verify-create-429": Fault(asks("create", "jobs"), BUSY, 2),
    "verify-create-500": Fault(asks("create", "jobs"), Refusal(500), 3),
    "verify-create-webhook": Fault(asks("create", "jobs"), Refusal(500, WEBHOOK), 3),
    **{f"verify-made-{n}": Fault(asks("create", "jobs"), shape) for n, shape in enumerate(ANSWERS.values())},
    **{f"verify-get-{n}": Fault(asks("get", "jobs"), shape, 2) for n, shape in enumerate(ANSWERS.values())},
}


def garbled() -> dict[str, Fault]:
    """Every answer in every wrong shape; of a sample each answer in some shapes, and each shape in some answer."""
    pairs = itertools.product(enumerate(READ.items()), enumerate(ANSWERS.values()))
    return {
        f"garbled-{what}-{shape_number}": Fault(concerns, shape, 2)
        for (number, (what, concerns)), (shape_number, shape) in pairs
        if ALL_FAULTS or (number + shape_number) % 4 == 0
    }


@pytest.fixture
def scene(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Scene:
    """One job."""
    return Scene(api, kubelet, "guard")


@pytest.mark.parametrize("story", ["retry", "verification"])
def test_jobs_get_through_whatever_the_server_answers_for_a_while(theatre: Theatre, story: str) -> None:
    faults = {**FAULTS, **garbled()} if story == "retry" else FAULTS_OF_VERIFICATIONS
    life = theatre.undisturbed(story)[story]
    since = time.monotonic()
    injection = Injection(faults)
    injection.into(theatre.proxy)
    theatre.stage.play((STORIES[story], theatre.stage.begin(STORIES[story], list(faults))))
    for name, fault in faults.items():
        # How often an answer can be garbled depends on how often it is asked for again.
        assert injection.counts[name] == fault.count or (injection.counts[name] and fault.count > 1), name
    theatre.compare(f"answers: {story}", {name: [name] for name in faults}, life, since=since)
    if "create-429" in faults:
        assert_heeded(injection.times["create-429"])


def assert_heeded(times: list[float]) -> None:
    """The server asked to be left alone for a second."""
    earlier, later = times
    assert later - earlier >= 1, "the server's wish to be left alone was not heeded"


@pytest.mark.parametrize(
    ("refusal", "reason", "says"),
    [
        (NO_RIGHT, "VerificationPending", "may not be created (jobs.batch is forbidden"),
        (Refusal(500, WEBHOOK), "VerificationPending", "Whoever is asked about Jobs (such as Kueue) does not answer"),
        (Refusal(422, "spec is wrong"), "VerificationFailed", "refuses the Job of the verification: spec is wrong"),
    ],
)
def test_why_a_verification_cannot_begin_is_said(
    unlucky: UnluckyOperator, scene: Scene, refusal: Refusal, reason: str, says: str
) -> None:
    unlucky.proxy.refuse = lambda call: refusal if call.resource == "jobs" and call.verb == "create" else None
    scene.apply(output=STORIES["verification"].spec["output"])
    scene.kubelet.succeed(scene.pods()[0], success())
    scene.wait_verified("Unknown", reason, says)


@contextmanager
def somebody_writes(api: Api, name: str) -> Iterator[Counter[str]]:
    """Somebody changes a label of a job again and again; how often he could."""
    stop, done = threading.Event(), Counter[str]()

    def write() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            try:
                api.patch("FineTuneJob", name, {"metadata": {"labels": {"seen": str(number)}}})
                done["writes"] += 1
            except ApiError:
                done["refused"] += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def test_somebody_who_labels_a_job_all_the_time_does_no_harm(theatre: Theatre, api: Api) -> None:
    story, life = STORIES["retry"], theatre.undisturbed("retry")["retry"]
    since = time.monotonic()
    scenes = theatre.stage.begin(story, ["labelled"])
    with somebody_writes(api, "labelled") as done:
        theatre.stage.play((story, scenes))
        wait_until(lambda: done["writes"] > 50)
    theatre.compare("10", {"409 storm: a label is written again and again": ["labelled"]}, life, since=since)
