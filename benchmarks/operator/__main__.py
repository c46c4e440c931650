"""`make bench-operator`: how fast the operator is, beside a naive one, on a real control plane in the same run.

Contestants take turns within each round and which one begins alternates, so that whatever else the machine does falls
on both. The report is Markdown on standard output; what is going on is told on standard error.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.console import machine, say
from benchmarks.operator.contestants import NAIVE, OURS, Contestant, install_naive_account
from benchmarks.operator.load import LoadError
from benchmarks.operator.population import populate
from benchmarks.operator.report import Report
from benchmarks.operator.scenarios import (
    among_many,
    arrivals,
    arrivals_and_restart,
    event_loop,
    settle_in,
    what_is_there,
)
from tests.cluster.control_plane import ControlPlane, run_control_plane
from tests.processes import StartError
from tests.tools.build import ToolError


def main(arguments: list[str] | None = None) -> int:
    """Measure and print the report; 1 when something went wrong."""
    options = _options(arguments)
    logging.basicConfig(format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder, report = Path(tempfile.mkdtemp(prefix="finetune-bench-")), Report()
    try:
        with run_control_plane(folder) as plane:
            install_naive_account(plane)
            _measure(plane, folder, options, report)
    except (LoadError, StartError, ToolError) as error:
        print(f"error: {error}\nLogs are in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 1
    finally:
        # What was measured until then is worth something.
        print(f"{_machine()}\n\n{report.markdown()}", flush=True)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=10, help="jobs per second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of jobs at that rate (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1000, help="created at once (default: %(default)s)")
    parser.add_argument(
        "--many",
        type=int,
        default=5000,
        help="jobs of the last situation, in one round (default: %(default)s; 0: none)",
    )
    parser.add_argument(
        "--existing", type=int, default=0, help="jobs that are there already, in a situation of its own (default: none)"
    )
    parser.add_argument("--alive", type=int, default=1000, help="how many of those run (default: %(default)s)")
    parser.add_argument(
        "--rest",
        type=float,
        default=330,
        help="seconds at rest among those; a resync is every 300 (default: %(default)s)",
    )
    parser.add_argument("--only", choices=[OURS.name, NAIVE.name], help="one contestant alone")
    return parser.parse_args(arguments)


def _measure(plane: ControlPlane, folder: Path, options: argparse.Namespace, report: Report) -> None:
    contestants = [contestant for contestant in (OURS, NAIVE) if options.only in (None, contestant.name)]
    steady = int(options.rate * options.seconds)
    titles = {
        "steady": f"{steady} jobs, {options.rate:g} per second",
        "burst": f"{options.jobs} jobs at once",
        "restart": f"Restart over {options.jobs} finished jobs",
        "many": f"{options.many} jobs at once",
    }

    def place(contestant: Contestant, situation: str, number: int) -> Path:
        say(f"{situation}, round {number + 1}: {contestant.name}")
        return folder / f"{situation}-{number}-{contestant.name}"

    for number in range(options.rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            if steady:
                found = arrivals(
                    plane, contestant, place(contestant, "steady", number), count=steady, per_second=options.rate
                )
                report.add(titles["steady"], contestant.name, found)
            if options.jobs:
                where = place(contestant, "burst", number)
                arrived, restarted = arrivals_and_restart(plane, contestant, where, count=options.jobs)
                report.add(titles["burst"], contestant.name, arrived)
                report.add(titles["restart"], contestant.name, restarted)
    if options.many:
        for contestant in contestants:
            where = place(contestant, "many", 0)
            found = arrivals(plane, contestant, where, count=options.many, per_second=None)
            report.add(titles["many"], contestant.name, found)

    if options.existing:
        _measure_population(plane, folder, options, report, contestants)


def _measure_population(
    plane: ControlPlane,
    folder: Path,
    options: argparse.Namespace,
    report: Report,
    contestants: Sequence[Contestant],
) -> None:
    past, present = "population-past", "population-present"
    for name in (past, present):
        plane.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        plane.api.wait("ServiceAccount", "default", bool, namespace=name)
    say(f"{options.existing} jobs are made, {options.alive} of them run")
    made = folder / "population"
    populate(plane, made, (past, present), finished=options.existing - options.alive, alive=options.alive)
    settle_in(plane, made)
    population = f"{options.existing} jobs, of which {options.alive} run"
    report.add(f"What is there: {population}", "all", what_is_there(plane, present))
    for contestant in contestants:
        say(f"among many: {contestant.name}")
        where, count = folder / f"among-{contestant.name}", int(options.rate * options.seconds)
        start, steady = among_many(
            plane, contestant, where, count=count, per_second=options.rate, rest_seconds=options.rest
        )
        report.add(f"Start and rest among {population}", contestant.name, start)
        report.add(f"{count} jobs, {options.rate:g} per second, among {population}", contestant.name, steady)
    if OURS in contestants:
        say("among many: the event loop")
        found = event_loop(plane, folder / "event-loop", count=100, per_second=options.rate)
        report.add(f"The event loop through a start and 100 jobs among {population}", OURS.name, found)


def _machine() -> str:
    return (
        f"{machine()}; kube-apiserver, etcd, kube-controller-manager, training operator and this benchmark run on the "
        "same cores."
    )


if __name__ == "__main__":
    sys.exit(main())
