"""Any single event of a watch is lost, or late: jobs end as ever, within one resync."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from finetune_api.outcome import Reason
from tests.cluster.api import Api, Object, wait_until
from tests.cluster.calls import job_of
from tests.cluster.conftest import UnluckyOperator
from tests.cluster.fault_proxy import SWALLOW
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, failure, success
from tests.cluster.stories import Moment, Stage, Story

WATCHES = ("finetunejobs", "pods", "pytorchjobs")


def _second_try(now: Moment) -> None:
    """A child is deleted by hand, and the next attempt succeeds."""
    if now.is_seen_running(1):
        now.scene.api.delete("PyTorchJob", now.scene.child(1))
    now.succeed(2)


STORY = Story(_second_try)


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
def stage(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Stage:
    """Where several jobs live."""
    return Stage(kubelet, api, unlucky.proxy)


@pytest.fixture
def scene(unlucky: UnluckyOperator, api: Api, kubelet: Kubelet) -> Scene:
    """One job."""
    wait_until(unlucky.proxy.watched, lambda open_: len(open_) == len(WATCHES))
    return Scene(api, kubelet, "guard")


def test_any_single_event_may_be_lost(unlucky: UnluckyOperator, stage: Stage, api: Api) -> None:
    unlucky.proxy.on_event = counting = Losing({})
    stage.play(STORY, stage.begin(STORY, ["whole"]))
    expected = wait_until(lambda: stage.ending("whole"))
    api.delete("FineTuneJob", "whole")
    wait_until(lambda: _jobs_counted(unlucky), lambda count: count == 0)
    cases: dict[str, tuple[str, int | str]] = {
        f"lost-{resource}-{number}": (resource, number)
        for resource in WATCHES
        for number in range(1, counting.counts[resource, "whole"] + 1)
    }
    cases["lost-end"] = ("finetunejobs", "DELETED")
    unlucky.proxy.on_event = losing = Losing(cases)
    scenes = stage.begin(STORY, list(cases))
    stage.play(STORY, scenes)
    for name in cases:
        wait_until(lambda name=name: stage.ending(name), lambda seen: seen == expected)  # type: ignore[misc]
        assert stage.history(name) == stage.history("whole"), name
        api.delete("FineTuneJob", name)
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


def test_an_operator_that_hears_of_everything_late_harms_no_namesake(unlucky: UnluckyOperator, scene: Scene) -> None:
    scene.apply()
    scene.run()
    old = scene.child()
    unlucky.proxy.on_event = lambda resource, event: 3.0
    scene.api.delete("FineTuneJob", scene.name)
    scene.api.wait_gone("FineTuneJob", scene.name)
    scene.apply()
    scene.change(suspend=True)
    scene.change(suspend=False)
    new = scene.child()
    scene.api.wait_gone("PyTorchJob", old)
    scene.kubelet.run(scene.pods()[0])
    scene.wait_phase("Preparing", "Running")
    unlucky.proxy.on_event = None
    scene.kubelet.succeed(scene.pod(), success())
    scene.wait_phase("Succeeded")
    assert [job["metadata"]["name"] for job in scene.pytorch_jobs()] == [new]
    assert unlucky.proxy.created(scene.name, "pytorchjobs") == [old, new]


def test_a_job_that_lives_for_a_moment_leaves_nothing(unlucky: UnluckyOperator, scene: Scene) -> None:
    for _ in range(5):
        scene.apply()
        scene.change(backoffLimit=1)
        scene.api.delete("FineTuneJob", scene.name)
    neighbour = Scene(scene.api, scene.kubelet, "neighbour")
    neighbour.apply()
    neighbour.run()
    wait_until(scene.pytorch_jobs, lambda jobs: [job["metadata"]["name"] for job in jobs] == [neighbour.child()])
    wait_until(lambda: _jobs_counted(unlucky), lambda count: count == 1)
