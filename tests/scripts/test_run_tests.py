"""The steps of `make test`, with small programs in the place of the builder and of pytest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.run_tests import CLUSTER, FAULTS, MODELS, ROOT, RUNS, STEPS, Run, Step
from tests.tools.build import SUITES

WAITS = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(600)
except KeyboardInterrupt:
    print("taken down")
"""
"""Says when it has begun, by a file, and that it was interrupted."""
AFTER = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
print("after it")
sys.exit(int(sys.argv[2]))
"""
"""Waits for such a file and ends with an exit code."""


def step(
    name: str,
    code: str,
    *arguments: object,
    after: str | None = None,
    is_lane: bool = False,
    is_quiet: bool = False,
) -> Step:
    """A step that runs a piece of Python."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return Step(name, command, after=after, is_lane=is_lane, is_quiet=is_quiet)


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, without times."""
    return [line.partition(" in ")[0] for line in capfd.readouterr().out.splitlines()]


def test_a_step_begins_when_the_one_before_has_succeeded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [
        step("tests", "print('tested'); print('and tested')", after="build"),
        step("build", "print('built')", is_quiet=True),
        step("check", "print('checked')", after="tests"),
    ]
    assert Run(steps, tmp_path).run() == 0
    # What is quiet says nothing as long as it succeeds.
    assert lines(capfd) == [
        "build | done",
        "tests | tested",
        "tests | and tested",
        "tests | done",
        "check | checked",
        "check | done",
    ]


def test_lanes_run_at_the_same_time_and_one_that_fails_leaves_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Each waits for the other.
    meet = (
        "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.02)\n"
    )
    steps = [
        step("one", meet + "print('one test failed'); sys.exit(3)", "1", "2", is_lane=True),
        step("two", meet + "time.sleep(0.5); print('to the end')", "2", "1", is_lane=True),
    ]
    assert Run(steps, tmp_path).run() == 1
    printed = lines(capfd)
    assert [line for line in printed if line.startswith("two")] == ["two | to the end", "two | done"]
    assert any(line.startswith("one | FAILED") for line in printed)
    # Where a reader of the end finds it.
    assert printed[-3:] == ["", "The end of one, which failed:", "one | one test failed"]


def test_a_build_that_fails_ends_the_run_and_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begun = tmp_path / "begun"
    steps = [
        step("build", f"{AFTER}", begun, 1, is_quiet=True),
        step("others", WAITS, begun, is_lane=True),
        step("cluster", "print('never')", after="build", is_lane=True),
    ]
    assert Run(steps, tmp_path).run() == 1
    printed = lines(capfd)
    assert "build   | after it" in printed
    assert "others  | taken down" in printed
    assert not any(line.startswith("cluster") for line in printed)


def test_what_does_not_end_when_it_is_asked_to_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.run_tests.END_SECONDS", 0.2)
    begun = tmp_path / "begun"
    deaf = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAITS}"
    assert Run([step("deaf", deaf, begun), step("build", AFTER, begun, 1)], tmp_path).run() == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_the_run_interrupts_every_step_once_and_leaves_none(tmp_path: Path, number: int) -> None:
    begun, pids = tmp_path / "begun", tmp_path / "pids"
    script = f"""
import sys
from scripts import run_tests
waits = "import os; open({str(pids)!r}, 'a').write(str(os.getpid()) + chr(10))" + {WAITS!r}
run_tests.STEPS = [
    run_tests.Step(name, [sys.executable, "-c", waits, {str(begun)!r} + name]) for name in ("one", "two")
]
sys.exit(run_tests.main())
"""
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not all(Path(f"{begun}{name}").exists() for name in ("one", "two")):
        assert run.poll() is None
    run.send_signal(number)
    output, _ = run.communicate()
    assert run.returncode == 130
    assert sorted(line for line in output.splitlines() if "taken down" in line and "|" in line) == [
        "one | taken down",
        "two | taken down",
    ]
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def _after(name: str | None) -> Sequence[str]:
    return [found.name for found in STEPS if found.after == name]


def test_tests_on_a_control_plane_wait_for_its_programs_and_nothing_else_for_anything() -> None:
    assert sorted(_after(None)) == ["build", "check", "models", "others", "runs"]
    assert {"cluster", "faults"} <= set(_after("build"))


def test_every_folder_of_tests_is_in_one_of_the_lanes() -> None:
    (others,) = (found for found in STEPS if found.name == "others")
    left_out = {part.removeprefix("--ignore=") for part in others.command if part.startswith("--ignore=")}
    assert left_out == {*CLUSTER, *FAULTS, *MODELS, *RUNS, "tests/node", "tests/serving"}
    assert all((ROOT / folder).is_dir() for folder in left_out)


def test_what_the_steps_build_are_suites() -> None:
    suites = [found.command[-1] for found in STEPS if found.name.startswith("build")]
    assert set(suites) <= SUITES.keys()
