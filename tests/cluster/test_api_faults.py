"""The API server refuses, stutters, goes away and comes back: jobs end as ever, and no operator becomes a zombie."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, ApiError, wait_until
from tests.cluster.calls import Call
from tests.cluster.conftest import UnluckyOperator
from tests.cluster.control_plane import ControlPlane
from tests.cluster.fault_proxy import Refusal
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, failure, success
from tests.cluster.stories import STORIES, Stage

WATCHES = ("finetunejobs", "pods", "pytorchjobs")
WEBHOOK = 'Internal error occurred: failed calling webhook "validator.pytorchjob.training-operator.kubeflow.org"'


def creates(resource: str) -> Callable[[Call], bool]:
    """Requests that create something of that kind."""
    return lambda call: (call.verb, call.resource) == ("create", resource)


def writes_status(call: Call) -> bool:
    """Requests that write a job's status."""
    return call.resource == "finetunejobs/status"


def anything(call: Call) -> bool:
    """All requests."""
    return True


Refusals = Mapping[str, tuple[Callable[[Call], bool], Refusal, int]]
"""Name of a job -> which requests about it are refused, how, and how many of them."""

REFUSALS: Refusals = {
    "everything-503": (anything, Refusal(503), 5),
    "everything-403": (anything, Refusal(403, "is forbidden: not yet"), 5),
    "everything-401": (anything, Refusal(401), 3),
    "everything-504": (anything, Refusal(504), 3),
    "config-429": (creates("configmaps"), Refusal(429, retry_after_seconds=1), 2),
    "config-403": (creates("configmaps"), Refusal(403, "is forbidden: not yet"), 3),
    "create-429": (creates("pytorchjobs"), Refusal(429, retry_after_seconds=1), 2),
    "create-429-0": (creates("pytorchjobs"), Refusal(429, retry_after_seconds=0), 5),
    "create-500": (creates("pytorchjobs"), Refusal(500), 4),
    "create-webhook": (creates("pytorchjobs"), Refusal(500, WEBHOOK), 3),
    "create-403": (creates("pytorchjobs"), Refusal(403, "is forbidden: not yet"), 3),
    "create-404": (creates("pytorchjobs"), Refusal(404), 2),
    "create-422": (creates("pytorchjobs"), Refusal(422), 2),
    "status-409": (writes_status, Refusal(409), 10),
    "status-429": (writes_status, Refusal(429, retry_after_seconds=1), 2),
    "status-500": (writes_status, Refusal(500), 4),
    "delete-500": (lambda call: call.verb == "delete", Refusal(500), 3),
    "event-500": (creates("events"), Refusal(500), 99),
    "event-403": (creates("events"), Refusal(403), 99),
}

NO_RIGHT = Refusal(403, 'jobs.batch is forbidden: User "finetune-operator" cannot do that')
REFUSALS_OF_VERIFICATIONS: Refusals = {
    "verify-none": (lambda call: call.resource == "jobs", NO_RIGHT, 6),
    "verify-get-403": (lambda call: (call.verb, call.resource) == ("get", "jobs"), NO_RIGHT, 4),
    "verify-create-403": (creates("jobs"), NO_RIGHT, 3),
    "verify-create-429": (creates("jobs"), Refusal(429, retry_after_seconds=1), 2),
    "verify-create-500": (creates("jobs"), Refusal(500), 3),
    "verify-create-webhook": (creates("jobs"), Refusal(500, WEBHOOK), 3),
}


class Refusing:
    """Refuses the first requests about each job, as the table says."""

    def __init__(self, refusals: Refusals = REFUSALS) -> None:
        self._refusals = refusals
        self.refused: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {name: [] for name in refusals}
        """Monotonic seconds."""

    def __call__(self, call: Call) -> Refusal | None:
        concerns, refusal, count = self._refusals.get(call.job, (anything, Refusal(500), 0))
        if not concerns(call) or self.refused[call.job] >= count:
            return None
        self.refused[call.job] += 1
        self.times[call.job].append(time.monotonic())
        return refusal


@pytest.fixture
def stage(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Stage:
    """Where several jobs live."""
    return Stage(kubelet, api, unlucky.proxy)


@pytest.fixture
def scene(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Scene:
    """One job."""
    return Scene(api, kubelet, "guard")


def test_jobs_get_through_whatever_the_server_refuses_for_a_while(unlucky: UnluckyOperator, stage: Stage) -> None:
    story = STORIES["retry"]
    unlucky.proxy.refuse = refusing = Refusing()
    scenes = stage.begin(story, ["undisturbed", *REFUSALS])
    stage.play(story, scenes)
    expected = wait_until(lambda: stage.ending("undisturbed"))
    for name, (_, _, count) in REFUSALS.items():
        wait_until(lambda name=name: stage.ending(name), lambda seen: seen == expected)  # type: ignore[misc]
        assert stage.history(name) == stage.history("undisturbed"), name
        assert refusing.refused[name] == count or count == 99, name
    assert_heeded(refusing.times["create-429"])


def test_verifications_get_through_whatever_the_server_refuses_for_a_while(
    unlucky: UnluckyOperator, stage: Stage
) -> None:
    story = STORIES["verification"]
    unlucky.proxy.refuse = refusing = Refusing(REFUSALS_OF_VERIFICATIONS)
    scenes = stage.begin(story, ["undisturbed", *REFUSALS_OF_VERIFICATIONS])
    stage.play(story, scenes)
    expected = wait_until(lambda: stage.ending("undisturbed"))
    for name, (_, _, count) in REFUSALS_OF_VERIFICATIONS.items():
        wait_until(lambda name=name: stage.ending(name), lambda seen: seen == expected)  # type: ignore[misc]
        assert stage.history(name) == stage.history("undisturbed"), name
        assert refusing.refused[name] == count, name


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


def assert_heeded(times: list[float]) -> None:
    """The server asked to be left alone for a second."""
    earlier, later = times
    assert later - earlier >= 1, "the server's wish to be left alone was not heeded"


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


def test_somebody_who_writes_all_the_time_does_no_harm(unlucky: UnluckyOperator, scene: Scene) -> None:
    scene.apply()
    with somebody_writes(scene.api, scene.name) as done:
        wait_until(lambda: unlucky.proxy.created("guard", "pytorchjobs"))
        since = done["writes"]
        wait_until(lambda: done["writes"] > since + 50)
    scene.run()
    scene.kubelet.succeed(scene.pod(), success())
    scene.wait_phase("Succeeded")
    assert len(unlucky.proxy.created("guard", "pytorchjobs")) == 1
    assert len(unlucky.proxy.created("guard", "configmaps")) == 1


@pytest.mark.parametrize("code", [410, 500])
def test_a_watch_that_ends_with_an_error_is_taken_up_again(unlucky: UnluckyOperator, scene: Scene, code: int) -> None:
    wait_until(unlucky.proxy.watched, lambda open_: len(open_) == len(WATCHES))
    scene.apply()
    scene.run()
    neighbour = Scene(scene.api, scene.kubelet, "neighbour")
    neighbour.apply()
    neighbour.wait_phase("Starting")
    with unlucky.proxy.silent(*WATCHES):
        # What is deleted before the watches begin anew is told by none of them.
        scene.api.delete("PyTorchJob", scene.child())
        scene.api.wait_gone("Pod", scene.pod())
        neighbour.api.delete("FineTuneJob", "neighbour")
        neighbour.api.wait_gone("FineTuneJob", "neighbour")
        assert unlucky.proxy.end_watches(code, *WATCHES) == len(WATCHES)
    if code != 410:
        # kopf takes up a watch only after a 410. The process ends instead, and Kubernetes starts it again.
        assert wait_until(lambda: unlucky.process.server.exit_code, lambda code: code is not None) == 1
        unlucky.process.start()
    scene.wait_attempts("WorkersDeleted")
    scene.run(attempt=2)
    scene.kubelet.succeed(scene.pod(attempt=2), success())
    scene.wait_phase("Succeeded")
    assert len(unlucky.proxy.created("guard", "pytorchjobs")) == 2


def test_the_process_ends_while_a_watch_waits_for_its_answer(unlucky: UnluckyOperator, scene: Scene) -> None:
    wait_until(unlucky.proxy.watched, lambda open_: len(open_) == len(WATCHES))
    with unlucky.proxy.unanswered("pods"):
        unlucky.proxy.end_watches(410, "pods")
        wait_until(lambda: unlucky.proxy.waiting_watches)
        # Left alone it would begin its watch anew for ever, and the dead operator would stay.
        unlucky.proxy.end_watches(500, "pytorchjobs")
        assert wait_until(lambda: unlucky.process.server.exit_code, lambda code: code is not None) == 1
    unlucky.process.start()
    scene.apply()
    scene.run()


def test_a_silent_watch_is_made_up_for_and_reported(unlucky: UnluckyOperator, scene: Scene) -> None:
    wait_until(unlucky.proxy.watched, lambda open_: len(open_) == len(WATCHES))
    with unlucky.proxy.silent(*WATCHES):
        scene.apply()
        pods = scene.run()
        scene.kubelet.fail(pods[0], 201, failure(Reason.HUB_UNAVAILABLE))
        scene.run(attempt=2)
        scene.change(suspend=True)
        scene.wait_phase("Suspended")
        # Something goes on changing, and only resyncs see it.
        wait_until(lambda: _healthz_after_a_change(unlucky, scene), lambda seen: seen == (500, _SILENT))
        assert unlucky.process.running
    # The next event proves that the watch works.
    unlucky.process.restart()
    assert _healthz(unlucky) == (200, "ok")


_SILENT = "The watch of finetunejobs is silent: two resyncs found changes, and no event told of any."


def _healthz_after_a_change(unlucky: UnluckyOperator, scene: Scene) -> tuple[int, str]:
    label = {"changed": secrets.token_hex(4)}
    scene.api.patch("FineTuneJob", scene.name, {"metadata": {"labels": label}})
    return _healthz(unlucky)


def _healthz(unlucky: UnluckyOperator) -> tuple[int, str]:
    answer = httpx.get(f"{unlucky.process.health_url}/healthz", trust_env=False)
    return answer.status_code, answer.text.strip()


def test_an_api_server_out_of_reach_is_reported_and_waited_for(unlucky: UnluckyOperator, scene: Scene) -> None:
    scene.apply()
    pods = scene.run()
    pid = unlucky.process.server.pid
    with unlucky.proxy.out_of_reach():
        # Three resync periods long.
        wait_until(lambda: _healthz(unlucky), lambda seen: "No full resync succeeded" in seen[1])
        scene.kubelet.fail(pods[0], 201, failure(Reason.HUB_UNAVAILABLE))
        assert unlucky.process.running
    scene.wait_attempts("HubUnavailable")
    scene.run(attempt=2)
    wait_until(lambda: _healthz(unlucky), lambda seen: seen == (200, "ok"))
    scene.kubelet.succeed(scene.pod(attempt=2), success())
    scene.wait_phase("Succeeded")
    assert unlucky.process.server.pid == pid
    assert len(unlucky.proxy.created("guard", "pytorchjobs")) == 2


def test_an_operator_that_starts_before_the_api_server_gets_to_work(unlucky: UnluckyOperator, scene: Scene) -> None:
    unlucky.process.stop()
    scene.apply()
    with unlucky.proxy.out_of_reach():
        unlucky.process.server.launch()
        ended = wait_until(lambda: _gave_up_or_waits(unlucky))
    if ended == "gave up":
        assert unlucky.process.server.exit_code == 1
    unlucky.process.start()
    scene.run()


def _gave_up_or_waits(unlucky: UnluckyOperator) -> str:
    if not unlucky.process.running:
        return "gave up"
    try:
        httpx.get(f"{unlucky.process.health_url}/readyz", trust_env=False)
    except httpx.TransportError:
        return ""
    return "waits"


def test_a_restart_of_the_api_server_ends_no_attempt(
    unlucky: UnluckyOperator, scene: Scene, control_plane: ControlPlane
) -> None:
    scene.apply()
    pods = scene.run()
    for _ in range(2):
        control_plane.api_server.restart()
        begun = unlucky.process.metrics()
        wait_until(lambda seen=begun: _resynced_since(unlucky, seen))  # type: ignore[misc]
    for server in control_plane.servers:
        server.start()  # those that gave up meanwhile
    assert "attempts" not in scene.status()
    wait_until(lambda: _healthz(unlucky), lambda seen: seen == (200, "ok"))
    scene.kubelet.succeed(pods[0], success())
    scene.wait_phase("Succeeded")
    assert len(unlucky.proxy.created("guard", "pytorchjobs")) == 1


def _looks(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("finetune_reconcile_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'result="success"' in line or "requeue" in line)


def _resynced_since(unlucky: UnluckyOperator, before: str) -> bool:
    return _looks(unlucky.process.metrics()) > _looks(before)
