"""Lives of jobs that play themselves: whoever looks at the world does what comes next, whatever the operator has heard.

A story has a beginning that nobody disturbs, something that happens then, and a course of its own from there on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_operator.names import ATTEMPT_LABEL
from finetune_operator.wire import Raw
from tests.operator.simulation.actors import End, is_over
from tests.operator.simulation.author import FINALIZER, NAME, manifest
from tests.operator.simulation.clients import is_going
from tests.operator.simulation.wire import Call
from tests.operator.simulation.world import World

AT_WORK = ("Preparing", "Running")
ACTS = 200
_TIMES = ("activeSeconds", "activeSince", "lastTransitionTime", "startTime", "completionTime", "attemptStartTime")
_UID = re.compile(rf"\b{NAME}-[0-9a-f]{{8}}\b")


@dataclass(frozen=True)
class Story:
    """A life of a job."""

    happens: Callable[[World], object]
    """What it is about."""
    act: Callable[[World], object]
    """What its author and its trainers do next, again and again."""
    begins: str = "Running"
    """Phase that the job is in before; empty where there is none yet."""

    def begin(self, world: World) -> None:
        """Bring the world to where the story begins."""
        if self.begins:
            apply(world)
            act = pods_run if self.begins in AT_WORK else _nothing
            play(world, act, lambda: phase(world) == self.begins and bool(world.client.find("pods")))

    def end(self, world: World) -> None:
        """Let it come to its end, with nothing in the way any more."""
        world.settle()
        play(world, self.act, lambda: is_over_for_good(world))
        world.settle()


def play(world: World, act: Callable[[World], object], until: Callable[[], bool]) -> None:
    """Let everybody do what comes next until that holds."""
    for _ in range(ACTS):
        if until():
            return
        act(world)
        world.surroundings_work()
        world.pass_time(1.0)
    raise AssertionError(f"It does not go on: {job(world)}")


def job(world: World) -> Raw | None:
    """The job, or None."""
    return world.client.get("finetunejobs", NAME)


def phase(world: World) -> str:
    """The job's."""
    return str(((job(world) or {}).get("status") or {}).get("phase"))


def is_over_for_good(world: World) -> bool:
    """Whether the job has ended, or is gone."""
    return job(world) is None or phase(world) in ("Succeeded", "Failed")


def apply(world: World) -> None:
    """The job's author applies it."""
    world.client.create("finetunejobs", manifest())


def suspend(world: World, *, value: bool = True) -> None:
    """Its author suspends it, or resumes it."""
    found = job(world)
    if found is not None:
        world.client.patch(found, {"spec": {"suspend": value}})


def delete(world: World, *, hold: bool = False) -> None:
    """Its author deletes it; it stays until `_let_go` where somebody's finalizer holds it."""
    found = job(world)
    if found is not None:
        if hold:
            found = world.client.patch(found, {"metadata": {"finalizers": [FINALIZER]}})
        world.client.delete(found)


def fail(world: World) -> None:
    """Its first attempt fails, for what may be over soon."""
    for pod in world.client.find("pods", labels=f"{ATTEMPT_LABEL}=1"):
        if not is_over(pod):
            world.kubelet.end(pod, End.WORLD_ERROR)


def pods_run(world: World) -> None:
    """Nodes start what is to be started."""
    for pod in world.client.find("pods"):
        if pod["status"]["phase"] == "Pending" and not is_going(pod):
            world.kubelet.run(pod)


def _succeed(attempt: int) -> Callable[[World], None]:
    def act(world: World) -> None:
        pods_run(world)
        for pod in world.client.find("pods", labels=f"{ATTEMPT_LABEL}={attempt}"):
            if pod["status"]["phase"] == "Running" and not is_going(pod) and phase(world) in AT_WORK:
                world.kubelet.end(pod, End.ADAPTER)

    return act


def _resume(world: World) -> None:
    found = job(world)
    conditions = [item["type"] for item in found["status"]["conditions"]] if found is not None else []
    if phase(world) == "Suspended" and "Reconciling" not in conditions:
        suspend(world, value=False)
    _succeed(2)(world)


def _let_go(world: World) -> None:
    found = job(world)
    if found is not None and not world.client.find("pods"):
        world.client.patch(found, {"metadata": {"finalizers": None}})


def _nothing(world: World) -> None:
    """Nobody does anything."""


def _edit_while_it_starts(world: World) -> None:
    found = job(world)
    if found is not None:
        world.client.patch(found, {"spec": {"backoffLimit": 2}})
    pods_run(world)


def _replace(world: World) -> None:
    delete(world)
    apply(world)


STORIES: Mapping[str, Story] = {
    "first attempt": Story(apply, _succeed(1), begins=""),
    "edit while it starts": Story(_edit_while_it_starts, _succeed(1), begins="Starting"),
    "success": Story(_succeed(1), _succeed(1)),
    "retry": Story(fail, _succeed(2)),
    "suspend": Story(suspend, _resume),
    "delete": Story(delete, _nothing),
    "delete what somebody holds up": Story(lambda world: delete(world, hold=True), _let_go),
    "delete and apply again": Story(_replace, _succeed(1)),
}


def ending(world: World) -> str:
    """How it all ended: the job without its times, and what is left of its attempts."""
    found = job(world)
    left = {
        kind: [raw["metadata"]["name"] for raw in world.client.find(kind)]
        for kind in ("pods", "pytorchjobs", "configmaps")
    }
    status = _timeless((found or {}).get("status"))
    return _UID.sub(NAME, json.dumps({"job": found is not None, "status": status, "left": left}, indent=1))


def history(written: Sequence[Call]) -> list[str]:
    """What operators created and deleted, in the order in which it was done."""
    children = [call for call in written if call.method != "PUT" and call.place.plural != "events"]
    names = [call.place.name or call.body["metadata"]["name"] for call in children]
    return [
        f"{call.method} {call.place.plural} {_UID.sub(NAME, name)}" for call, name in zip(children, names, strict=True)
    ]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
