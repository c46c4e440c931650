"""Any single event of a watch is lost, or late: jobs live and end as ever, what was lost is found within one resync."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, Object, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, failure, success
from tests.faults.calls import job_of
from tests.faults.conftest import UnluckyOperator
from tests.faults.fault_table import ALL_FAULTS
from tests.faults.faults import SWALLOW
from tests.faults.stories import STORIES
from tests.faults.theatre import Theatre

WATCHES = ("finetunejobs", "pods", "pytorchjobs")
SAMPLE = ("workers deleted", "preemption by a queue")
OTHERS = ("retry", "suspend and resume", "verification", "ttl", "deletion", "deletion held up")
PLAYED = SAMPLE + OTHERS if ALL_FAULTS else SAMPLE
GONE_SECONDS = 120
"""Within which namespaces of tests before are gone."""


class Losing:
    """Keeps the n-th event of a kind about a job from the operator."""

    def __init__(self, cases: Mapping[str, tuple[str, int | str]]) -> None:
        self._cases = cases
        """Job -> plural and n, from 1, or the type of the event."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """(plural, job) -> events so far."""
        self.lost: list[tuple[str, str, str]] = []
        """Job, plural and type of what was lost."""

    def __call__(self, resource: str, event: Object) -> float | None:
        job = job_of(resource, event["object"])
        self.counts[resource, job] += 1
        if self._cases.get(job) not in ((resource, self.counts[resource, job]), (resource, event["type"])):
            return None
        self.lost.append((job, resource, event["type"]))
        return SWALLOW


@pytest.fixture
def scene(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Scene:
    """One job."""
    wait_until(unlucky.proxy.watched, lambda open_: len(open_) == len(WATCHES))
    return Scene(api, kubelet, "guard")


def test_any_single_event_may_be_lost(theatre: Theatre, unlucky: UnluckyOperator, api: Api) -> None:
    wait_until(lambda: _jobs_counted(unlucky), lambda count: count == 0, GONE_SECONDS)
    unlucky.proxy.on_event = counting = Losing({})
    theatre.lives.clear()  # how many events there are is counted now
    lives = theatre.undisturbed(*PLAYED)
    since = time.monotonic()
    cases: dict[str, tuple[str, int | str]] = {}
    casts: dict[str, list[str]] = {}
    for number, story in enumerate(PLAYED):
        mine = {
            f"lost-{number}-{resource}-{place}": (resource, place)
            for resource in WATCHES
            for place in range(1, counting.counts[resource, f"life-{number}-one"] + 1)
        }
        casts[story] = list(mine)
        cases |= mine
    casts[PLAYED[0]].append("lost-end")
    cases["lost-end"] = ("finetunejobs", "DELETED")
    unlucky.proxy.on_event = losing = Losing(cases)
    theatre.stage.play(
        *((STORIES[story], theatre.stage.begin(STORIES[story], names)) for story, names in casts.items())
    )
    for story, names in casts.items():
        theatre.compare(f"3: {story}", {f"each of {len(names)} events lost": names}, lives[story], since=since)
    for job in api.list("FineTuneJob"):
        api.delete("FineTuneJob", job["metadata"]["name"])
    wait_until(lambda: _jobs_counted(unlucky), lambda count: count == 0)
    print(Counter((resource, kind) for _, resource, kind in losing.lost))
    assert {(resource, kind) for _, resource, kind in losing.lost} >= {
        (resource, kind) for resource in WATCHES for kind in ("ADDED", "MODIFIED", "DELETED")
    }


def _jobs_counted(unlucky: UnluckyOperator) -> float:
    """Jobs that the operator believes to exist."""
    found = re.findall(r"^finetune_jobs\{.*\} (\S+)$", unlucky.process.metrics(), re.MULTILINE)
    return sum(float(count) for count in found)


def _fail(scene: Scene) -> None:
    scene.kubelet.fail(scene.pod(), 201, failure(Reason.HUB_UNAVAILABLE))


def _delete_child(scene: Scene) -> None:
    scene.api.delete("PyTorchJob", scene.child())
    scene.api.wait_gone("PyTorchJob", scene.child())
    scene.api.wait_gone("Pod", scene.pod())


@pytest.mark.parametrize(("happens", "reason"), [(_fail, "HubUnavailable"), (_delete_child, "WorkersDeleted")])
def test_whatever_happens_to_children_while_nothing_is_told_of_them(
    unlucky: UnluckyOperator, scene: Scene, happens: Any, reason: str
) -> None:
    scene.apply()
    scene.run()
    with unlucky.proxy.silent("pods", "pytorchjobs"):
        happens(scene)
        scene.wait_attempts(reason)


@pytest.mark.parametrize("seconds", [3.0, 30.0] if ALL_FAULTS else [3.0])
def test_an_operator_that_hears_of_everything_late_harms_no_namesake(
    theatre: Theatre, scene: Scene, seconds: float
) -> None:
    scene.apply()
    scene.run()
    old = scene.child()
    theatre.proxy.on_event = lambda resource, event: seconds
    scene.api.delete("FineTuneJob", scene.name)
    scene.api.wait_gone("FineTuneJob", scene.name)
    scene.apply()
    scene.change(suspend=True)
    scene.change(suspend=False)
    new = scene.child()
    scene.api.wait_gone("PyTorchJob", old)
    scene.kubelet.run(scene.pods()[0])
    scene.wait_phase("Preparing", "Running")
    theatre.proxy.on_event = None
    scene.kubelet.succeed(scene.pod(), success())
    scene.wait_phase("Succeeded")
    assert [job["metadata"]["name"] for job in scene.pytorch_jobs()] == [new]
    wait_until(lambda: theatre.stage.created(scene.name), lambda made: made == [old, new])


def test_a_job_that_lives_for_a_moment_leaves_nothing(unlucky: UnluckyOperator, scene: Scene) -> None:
    wait_until(lambda: _jobs_counted(unlucky), lambda count: count == 0, GONE_SECONDS)
    for _ in range(5):
        scene.apply()
        scene.change(backoffLimit=1)
        scene.api.delete("FineTuneJob", scene.name)
    neighbour = Scene(scene.api, scene.kubelet, "neighbour")
    neighbour.apply()
    neighbour.run()
    wait_until(scene.pytorch_jobs, lambda jobs: [job["metadata"]["name"] for job in jobs] == [neighbour.child()])
    wait_until(lambda: _jobs_counted(unlucky), lambda count: count == 1)
