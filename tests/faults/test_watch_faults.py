"""A watch ends in nonsense, falls silent or is never answered: it is taken up again, and what it kept back is found."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial

import httpx
import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, failure
from tests.faults.calls import Call
from tests.faults.conftest import UnluckyOperator
from tests.faults.fault_table import ALL_FAULTS
from tests.faults.faults import WATCH_ENDS, Refusal
from tests.faults.stories import STORIES
from tests.faults.theatre import Theatre

WATCHES = ("finetunejobs", "pods", "pytorchjobs")
SAMPLED_ENDS = (
    "410",
    "500",
    "an error that is a text",
    "half a line of text",
    "a bookmark of metadata null",
    "nothing",
)
SHORT_SECONDS = 3.0


@pytest.fixture
def scene(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Scene:
    """One job, in front of an operator that watches."""
    _wait_watches(unlucky)
    return Scene(api, kubelet, "guard")


def _wait_watches(unlucky: UnluckyOperator) -> None:
    wait_until(unlucky.proxy.watched, lambda open_: sorted(set(open_)) == sorted(WATCHES))


def _healthz(unlucky: UnluckyOperator) -> tuple[int, str]:
    answer = httpx.get(f"{unlucky.process.health_url}/healthz", trust_env=False)
    return answer.status_code, answer.text.strip()


@pytest.mark.parametrize("begins", ["with a stream", "with a list"])
def test_a_watch_that_ends_in_any_way_is_taken_up_again(
    theatre: Theatre, unlucky: UnluckyOperator, api: Api, begins: str
) -> None:
    if begins == "with a list":
        # Of an API server that does not say how new it is, lists are asked for, as of those before 1.34.
        unlucky.proxy.refuse = lambda call: Refusal(404) if call.resource == "/version" else None
        unlucky.process.restart()
    story, life = STORIES["workers deleted"], theatre.undisturbed("workers deleted")["workers deleted"]
    _wait_watches(unlucky)
    pid = unlucky.process.server.pid
    since = time.monotonic()
    ends = list(WATCH_ENDS if ALL_FAULTS else SAMPLED_ENDS)
    names = {end: f"ended-{number}" for number, end in enumerate(ends)}
    scenes = {scene.name: scene for scene in theatre.stage.begin(story, list(names.values()))}
    at_work = partial(_is_at_work, theatre)
    theatre.stage.play((story, list(scenes.values())), until=at_work)
    for end, name in names.items():
        with unlucky.proxy.silent(*WATCHES):
            # What is deleted before the watches begin anew is told by none of them.
            api.delete("PyTorchJob", scenes[name].child())
            api.wait_gone("Pod", scenes[name].pod())
            assert unlucky.proxy.end_watches(WATCH_ENDS[end], *WATCHES) >= len(WATCHES), end
        _wait_watches(unlucky)
        assert unlucky.process.running, end
    theatre.stage.play((story, list(scenes.values())))
    injected = {f"watches begin {begins}, end with {end}": [name] for end, name in names.items()}
    theatre.compare("5, 6", injected, life, since=since)
    assert unlucky.process.server.pid == pid
    if begins == "with a list":
        unlucky.process.stop()  # the next test wants one that streams


def _is_at_work(theatre: Theatre, name: str) -> bool:
    return theatre.stage.phase(name) in ("Preparing", "Running")


def test_a_watch_that_ends_again_and_again_is_no_storm_of_requests(unlucky: UnluckyOperator, scene: Scene) -> None:
    asked: list[float] = []

    def end(call: Call) -> Refusal | None:
        if call.verb != "watch":
            return None
        asked.append(time.monotonic())
        return Refusal(200, body=b"")

    unlucky.proxy.refuse = end
    unlucky.proxy.end_watches(b"", *WATCHES)
    wait_until(lambda: len(asked) >= 3 * len(WATCHES))
    begun = time.monotonic()
    time.sleep(SHORT_SECONDS)
    found = [moment for moment in asked if moment > begun]
    assert len(found) <= 2 * len(WATCHES) * SHORT_SECONDS, f"{len(found)} watches in {SHORT_SECONDS} s"
    unlucky.proxy.refuse = None
    _wait_watches(unlucky)


REFUSALS = {
    "400": Refusal(400),
    "403": Refusal(403),
    "404": Refusal(404),
    "404 text": Refusal(404, body=b"404 page not found\n"),
    "409": Refusal(409),
    "410": Refusal(410),
    "422": Refusal(422),
    "429": Refusal(429, retry_after=1),
    "429 until a date": Refusal(429, retry_after="Fri, 31 Jan 2031 23:59:59 GMT"),
    "500": Refusal(500),
    "502 html": Refusal(502, body=b"<html>Bad Gateway</html>"),
    "503": Refusal(503),
    "504": Refusal(504),
}
"""What a watch may be refused with."""
SAMPLED_REFUSALS = ("404", "410", "429 until a date", "502 html")


@pytest.mark.parametrize("refusal", REFUSALS if ALL_FAULTS else SAMPLED_REFUSALS)
def test_a_watch_that_is_refused_is_asked_for_again(unlucky: UnluckyOperator, scene: Scene, refusal: str) -> None:
    refused: list[str] = []

    def refuse(call: Call) -> Refusal | None:
        if call.verb != "watch" or call.resource != "pytorchjobs" or len(refused) >= 2:
            return None
        refused.append(call.resource)
        return REFUSALS[refusal]

    unlucky.proxy.refuse = refuse
    unlucky.proxy.end_watches(WATCH_ENDS["410"], "pytorchjobs")
    wait_until(lambda: len(refused) >= 2 or not unlucky.process.running)
    assert unlucky.process.running
    _wait_watches(unlucky)


def test_the_process_ends_while_a_watch_waits_for_its_answer(unlucky: UnluckyOperator, scene: Scene) -> None:
    with unlucky.proxy.unanswered("pods"):
        unlucky.proxy.end_watches(WATCH_ENDS["410"], "pods")
        wait_until(lambda: unlucky.proxy.waiting_watches)
        # Left alone it would begin its watch anew for ever, and the dead operator would stay.
        assert unlucky.process.stop() == 0
    unlucky.process.start()
    scene.apply()
    scene.run()


def _pod_waits(scene: Scene) -> None:
    scene.kubelet.pull_fails(scene.pod(), "trainer:test")


def _pod_runs(scene: Scene) -> None:
    scene.kubelet.run(scene.pod())


def _edited(scene: Scene) -> None:
    worker = {"template": {"spec": {"terminationGracePeriodSeconds": 7}}}
    scene.api.patch("PyTorchJob", scene.child(), {"spec": {"pytorchReplicaSpecs": {"Worker": worker}}})


def _labelled(scene: Scene, kind: str, name: str) -> None:
    scene.api.patch(kind, name, {"metadata": {"labels": {"changed": secrets.token_hex(4)}}})


def _suspended(scene: Scene) -> None:
    scene.change(suspend=True)


KEPT_BACK: dict[str, tuple[Callable[[Scene], None], str]] = {
    "pods": (_pod_waits, "ImagePullBackOff"),
    "pytorchjobs": (_edited, "was edited by hand"),
    "finetunejobs": (_suspended, "The job is suspended"),
}
"""Kind -> something that no other watch tells of, and what status says of it."""


@pytest.mark.parametrize("kind", WATCHES)
def test_what_one_silent_watch_keeps_back_is_found_by_the_next_resync_and_reported(
    unlucky: UnluckyOperator, scene: Scene, kind: str
) -> None:
    scene.apply()
    scene.run()
    happens, says = KEPT_BACK[kind]
    resyncs: list[str] = []

    def note(call: Call, code: int) -> None:
        if call.verb == "list" and call.resource == kind and not call.namespace:
            resyncs.append(call.resource)

    with unlucky.proxy.silent(kind):
        unlucky.proxy.after_answer = note
        happens(scene)
        since = len(resyncs)
        wait_until(lambda: says in scene.condition(scene.status())["message"] or says in str(scene.status()))
        # One may have begun before, and the next begins as soon as this one is done.
        assert len(resyncs) - since <= 2
        assert unlucky.process.running
        silent = f"The watch of {kind} is silent: two resyncs found changes, and no event told of any."
        wait_until(lambda: _healthz_after_a_change(unlucky, scene, kind), lambda seen: seen == (500, silent))
    # The next event proves that the watch works.
    wait_until(lambda: _healthz_after_a_change(unlucky, scene, kind), lambda seen: seen == (200, "ok"))


def _healthz_after_a_change(unlucky: UnluckyOperator, scene: Scene, kind: str) -> tuple[int, str]:
    if kind == "pods":
        _labelled(scene, "Pod", scene.pods()[0]["metadata"]["name"])
    elif kind == "pytorchjobs":
        _labelled(scene, "PyTorchJob", scene.child())
    else:
        _labelled(scene, "FineTuneJob", scene.name)
    return _healthz(unlucky)


def test_jobs_get_on_while_every_watch_is_silent(unlucky: UnluckyOperator, scene: Scene) -> None:
    with unlucky.proxy.silent(*WATCHES):
        scene.apply()
        pods = scene.run()
        scene.kubelet.fail(pods[0], 201, failure(Reason.HUB_UNAVAILABLE))
        scene.run(attempt=2)
