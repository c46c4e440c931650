"""The operator is killed and started again and again over many jobs: nothing is written, made or deleted for it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.cluster.api import Api, wait_until
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene
from tests.faults.conftest import UnluckyOperator
from tests.faults.fault_table import ALL_FAULTS
from tests.faults.stories import AT_WORK, STORIES
from tests.faults.theatre import Theatre

JOBS = 1000 if ALL_FAULTS else 80
RUNNING, STARTS = 10, 3


def test_a_storm_of_restarts_over_many_jobs_changes_nothing(
    theatre: Theatre, unlucky: UnluckyOperator, api: Api, kubelet: Kubelet
) -> None:
    story, life = STORIES["retry"], theatre.undisturbed("retry")["retry"]
    resting = [Scene(api, kubelet, f"rests-{number}") for number in range(JOBS - RUNNING)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda scene: scene.apply(suspend=True), resting))
    scenes = theatre.stage.begin(story, [f"runs-{number}" for number in range(RUNNING)])
    theatre.stage.play((story, scenes), until=lambda name: theatre.stage.phase(name) in AT_WORK)
    wait_until(lambda: _phases(api), lambda found: found.count("Suspended") == len(resting), 300)
    since = time.monotonic()
    before = _versions(api)
    unlucky.process.kill()
    done = len(unlucky.proxy.done)
    for _ in range(STARTS):
        # Killed in the midst of its start.
        unlucky.process.server.launch()
        wait_until(lambda: "finetune_jobs" in _metrics(unlucky))
        unlucky.process.kill()
    unlucky.process.start()
    assert unlucky.proxy.done[done:] == []
    assert _versions(api) == before
    theatre.stage.play((story, scenes))
    injected = f"{STARTS + 1} starts over {JOBS} jobs"
    theatre.compare("19", {injected: [scene.name for scene in scenes]}, life, since=since)


def _metrics(unlucky: UnluckyOperator) -> str:
    try:
        return unlucky.process.metrics()
    except httpx.TransportError:
        return ""


def _phases(api: Api) -> list[str]:
    return [(job.get("status") or {}).get("phase", "") for job in api.list("FineTuneJob")]


def _versions(api: Api) -> dict[str, str]:
    return {job["metadata"]["name"]: job["metadata"]["resourceVersion"] for job in api.list("FineTuneJob")}
