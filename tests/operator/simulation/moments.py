"""All that the future of a simulated world depends on, in one digest: orders that lead to the same need no second life.

What is left out is what only tells who reads it: metrics, names of tasks, addresses.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

import orjson

from tests.operator.simulation.model import Model
from tests.operator.simulation.operator import SimulatedOperator
from tests.operator.simulation.world import World

_NUMBER = re.compile(r" at 0x[0-9a-f]+|Task-[0-9]+")
_IDLE = "WorkQueue._next"
"""What waits for the next job begins anew when one comes; what it waits for is the queue's."""


def digest(world: World, model: Model) -> bytes:
    """Of the server, of the operator that was started last, of its requests under way, and of what the model noted."""
    server, operator = world.server, world.operators[-1]
    objects = orjson.dumps([world.loop.time(), server.version, list(server._objects.values())])
    return hashlib.sha256(objects + repr([*_of(operator), *_under_way(world), *_of_model(model)]).encode()).digest()


def _of(operator: SimulatedOperator) -> Iterator[Any]:
    yield {kind: [(event.type, event.raw) for event in events] for kind, events in operator.pending.items()}
    yield (
        operator.alive,
        sorted(operator.late),
        [vars(fault) for fault in operator.wire.faults],
        len(operator.wire.held),
    )
    yield {name: kept for name, kept in vars(operator.cache).items() if name not in ("_forgotten", "told")}
    yield operator.queue._entries, operator.queue._ready, [(due, key) for due, _, key in operator.queue._timers]
    yield operator.reconciler._failures, operator.reconciler._under_way
    yield [call[3:] for call in operator.wire.sent if call.method == "PUT" and call.made is not None][-1:]


def _under_way(world: World) -> list[str]:
    """Where each task is, what it holds, and what it has sent; tasks have no order."""
    sent = [call for operator in world.alive for call in operator.wire.sent]
    found = []
    for task in asyncio.all_tasks(world.loop):
        frames = [_at(frame) for frame in _frames(task.get_coro())]
        calls = [call[2:5] for call in sent if call.task == task.get_name()]
        found.append(_NUMBER.sub("", repr((frames, calls))))
    return sorted(found)


def _frames(coroutine: Any) -> Iterator[FrameType]:
    while getattr(coroutine, "cr_frame", None) is not None and coroutine.cr_code.co_qualname != _IDLE:
        yield coroutine.cr_frame
        coroutine = coroutine.cr_await


def _at(frame: FrameType) -> tuple[str, int, dict[str, Any]]:
    # Real time goes into metrics alone.
    held = {name: value for name, value in frame.f_locals.items() if name != "started"}
    return frame.f_code.co_qualname, frame.f_lasti, held


def _of_model(model: Model) -> Iterator[Any]:
    yield sorted((attempt, sorted(reasons)) for attempt, reasons in model.happened.items())
    yield model.ends, sorted(model._released)
