"""A job that reports every few seconds for a day: what the operator keeps at its end is what it kept after an hour."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.progress.sender import Sender
from finetune_operator.queue import SPARE_TIMERS
from tests.operator.simulation.author import NAME, manifest, report
from tests.operator.simulation.clients import NAMESPACE
from tests.operator.simulation.operator import SimulatedOperator
from tests.operator.simulation.world import Circumstances, World

HOUR, DAY, REPORT_SECONDS = 3600, 24 * 3600, 5


class Kept(NamedTuple):
    """What a process keeps at one moment."""

    tasks: int
    jobs: tuple[int, int]
    events: int


def test_a_day_of_reports_under_a_deadline_leaves_no_growth() -> None:
    world = World(Circumstances(progress=True))
    try:
        operator = world.start_operator()
        job = world.client.create(FINETUNE_PLURAL, manifest(activeDeadlineSeconds=7 * DAY))
        world.settle()
        (pod,) = world.client.find(PODS_PLURAL)
        world.kubelet.run(pod)
        world.settle()
        (child,) = world.client.find(PYTORCH_PLURAL)
        sender = Sender(
            NAMESPACE,
            NAME,
            job["metadata"]["uid"],
            1,
            child["metadata"]["uid"],
            pod["metadata"]["name"],
            pod_created_at=world.now(),
        )
        kept: list[Kept] = []
        for second in range(REPORT_SECONDS, DAY + 1, REPORT_SECONDS):
            assert operator.report(sender, report("Running", second * 100 // DAY, world.now()))
            world.pass_time(REPORT_SECONDS)
            if second % HOUR == 0:
                kept.append(what_is_kept(operator, world))
                assert operator.queue.timers() <= 2 + SPARE_TIMERS
        assert kept == 24 * [kept[0]]
        (job,) = world.client.find(FINETUNE_PLURAL)
        assert job["status"]["progress"]["percent"] == 100
    finally:
        world.close()


def what_is_kept(operator: SimulatedOperator, world: World) -> Kept:
    """By the operator, and by the API server because of it."""
    return Kept(len(asyncio.all_tasks(world.loop)), operator.cache.size(), len(world.client.find("events")))
