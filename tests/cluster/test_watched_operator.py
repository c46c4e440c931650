"""The watchdog of the operator's event loop barks at what keeps the loop, and at nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import watched_operator
from tests.cluster.watched_operator import COLLECTOR, LIMIT_SECONDS, Blocked, read_blocked
from tests.machine_pauses import Pauses

PROGRAM = """
import asyncio, gc, sys, threading, time
from pathlib import Path
from tests.cluster.watched_operator import LIMIT_SECONDS, watch_into

def works(seconds=3 * LIMIT_SECONDS):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass

def works_and_fails():
    works()
    raise ValueError

async def task():
    await asyncio.sleep(0)
    works()

async def pauses():
    for _ in range(6):
        works(LIMIT_SECONDS / 2)
        await asyncio.sleep(0)

async def in_thread():
    await asyncio.to_thread(works)

async def sleeps():
    time.sleep(4 * LIMIT_SECONDS)

async def collects():
    kept = []
    seconds = 0
    while seconds < 2 * LIMIT_SECONDS:
        kept.append([[] for _ in range(100_000)])
        await asyncio.sleep(0)
        began = time.thread_time()
        gc.collect()
        seconds = time.thread_time() - began

async def main():
    gc.disable()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    match sys.argv[1]:
        case "callback": loop.call_soon(works)
        case "timer": loop.call_later(0.001, works)
        case "failure": loop.call_soon(works_and_fails)
        case name: await globals()[name]()
    await asyncio.sleep(0.01)

watch_into(Path(sys.argv[2]))
asyncio.run(main())
"""


def told(what: str, folder: Path) -> list[Blocked]:
    """What the watchdog says of a program that does this."""
    file = folder / "blocked.jsonl"
    root = Path(watched_operator.__file__).parents[2]
    subprocess.run([sys.executable, "-c", PROGRAM, what, file], cwd=root, check=True, timeout=60)
    return read_blocked(file)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("callback", "The callback works"),
        ("timer", "The callback works"),
        ("failure", "The callback works_and_fails"),
        ("task", "The task main"),
    ],
)
def test_what_keeps_the_loop_is_told_with_its_name_and_its_stack(what: str, name: str, tmp_path: Path) -> None:
    (blocked,) = told(what, tmp_path)
    assert blocked.what == name
    assert blocked.seconds > LIMIT_SECONDS
    assert ", in works\n" in blocked.stack
    assert str(blocked).startswith(f"{name} kept the event loop for ")


@pytest.mark.parametrize("what", ["pauses", "in_thread", "sleeps"])
def test_short_work_work_of_other_threads_and_waiting_for_the_processor_are_not(what: str, tmp_path: Path) -> None:
    assert told(what, tmp_path) == []


def test_a_collection_is_told_as_such(tmp_path: Path) -> None:
    assert {blocked.what for blocked in told("collects", tmp_path)} == {COLLECTOR}


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    file = tmp_path / "blocked.jsonl"
    assert read_blocked(file) == []
    file.write_text(json.dumps({"what": "one", "seconds": 1.0, "stack": ""}) + "\n")
    since = file.stat().st_size
    with file.open("a") as lines:
        lines.write(json.dumps({"what": "two", "seconds": 2.0, "stack": ""}) + "\n")
    assert [blocked.what for blocked in read_blocked(file)] == ["one", "two"]
    assert read_blocked(file, since) == [Blocked("two", 2.0, "")]


def test_a_pause_of_the_machine_is_no_fault_of_what_ran() -> None:
    pauses = Pauses()
    for moment in (100.0, 100.02, 100.1, 102.1, 102.12):
        pauses.woke(moment)
    assert pauses.within(100.0, 102.2) == pytest.approx(2.0)
    assert pauses.within(101.9, 102.0) == pytest.approx(2.0)
    assert pauses.within(103.0, 104.0) == 0
    assert pauses.within(90.0, 99.0) == 0
