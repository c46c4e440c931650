"""A cluster in memory in which an hour takes no time: API server, operators, training operator, nodes and Kueue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache

from finetune_operator.names import KUEUE_QUEUE_LABEL
from finetune_operator.policy.times import moment
from finetune_operator.settings import OperatorSettings
from finetune_operator.wire import Raw
from tests.operator.jumping_loop import JumpingLoop
from tests.operator.simulation.actors import Kubelet, TrainingOperator
from tests.operator.simulation.clients import Client, is_going
from tests.operator.simulation.operator import SimulatedOperator
from tests.operator.simulation.server import EPOCH, Place, SimulatedServer
from tests.operator.simulation.wire import Call, Witness

QUIET_SECONDS = 70.0
"""Longer than anything waits that is still to come: back-off after errors, retries, and ends of groups."""
SOON_SECONDS = 50.0
"""Longer than it takes to see that nothing moves."""
STEPS_TO_REST = 60


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a world is like from its beginning to its end."""

    latency_seconds: float = 0.0
    node_skew_seconds: int = 0
    """How far the clocks of nodes are ahead."""
    same_uid_prefix: bool = False
    """Children of two jobs of one name have the same names."""
    queued: bool = False
    """Kueue holds every PyTorchJob that is created, until it admits it."""
    progress: bool = False
    """Trainers report to the operator."""


class World:
    """The cluster."""

    def __init__(self, circumstances: Circumstances = Circumstances()) -> None:
        self.circumstances = circumstances
        self.loop = JumpingLoop()
        self.server = SimulatedServer(self.now, uid=self._uid, admit=self._admit)
        self.client = Client(self.server)
        self.training_operator = TrainingOperator(self.client, self.now)
        skew = timedelta(seconds=circumstances.node_skew_seconds)
        self.kubelet = Kubelet(self.client, lambda: self.now() + skew)
        self.settings = _settings(progress=circumstances.progress)
        self.operators: list[SimulatedOperator] = []
        self.witness: Witness = lambda call, sent: None
        self.missed = False
        """Something was kept from a watch since the last resync."""
        self._started = 0
        self._wrong: list[Exception] = []
        self._log = _Errors()
        logging.getLogger("finetune_operator").addHandler(self._log)

    def now(self) -> datetime:
        """The time."""
        return EPOCH + timedelta(seconds=self.loop.time())

    def close(self) -> None:
        """The end."""
        for operator in self.operators:
            operator.crash()
        self.loop.run_until_complete(asyncio.sleep(1.0))
        logging.getLogger("finetune_operator").removeHandler(self._log)
        self.loop.close()

    @property
    def alive(self) -> list[SimulatedOperator]:
        """Operators that run."""
        return [operator for operator in self.operators if operator.alive]

    def start_operator(self, skew_seconds: int = 0) -> SimulatedOperator:
        """Another process of the operator begins."""
        self._started += 1
        operator = SimulatedOperator(
            self.server,
            self.settings,
            self.loop,
            number=self._started,
            now=self.now,
            skew=timedelta(seconds=skew_seconds),
            latency_seconds=self.circumstances.latency_seconds,
            witness=self._watch_over,
        )
        self.operators = [*self.alive, operator]
        return operator

    def pass_time(self, seconds: float) -> None:
        """Let everything happen that is due within so many seconds."""
        self.loop.run_until_complete(asyncio.sleep(seconds))
        if self._wrong:
            raise self._wrong[0]
        for operator in self.operators:
            operator.check()
        assert not self._log.lines, "\n".join(self._log.lines)

    def surroundings_work(self) -> None:
        """Whoever has something to do by itself does it: training operator, garbage collector, kubelets."""
        self.training_operator.work()
        self.server.collect()
        for pod in self.client.find("pods"):
            if is_going(pod):
                self.kubelet.confirm(pod)

    def settle(self) -> None:
        """Nothing goes wrong any more, everything is delivered, and all do what they have to do until nothing is left.

        Raises:
            AssertionError: it never comes to rest.
        """
        if not self.alive:
            self.start_operator()
        for operator in self.alive:
            operator.wire.faults.clear()
            operator.wire.let_go()
            operator.deliver_all()
        self._rest()
        if self.missed:
            self.resync()
            self.missed = False
            self._rest()
        while self._is_due_soon():
            self.pass_time(SOON_SECONDS)
            self._rest()

    def _is_due_soon(self) -> bool:
        """Whether some operator's clock is about to reach a deadline or a TTL, which would end the rest."""
        times = [due for job in self.client.find("finetunejobs") for due in _times(job)]
        clocks = [self.now(), *(operator.now() for operator in self.alive)]
        return any(0 <= (due - clock).total_seconds() <= SOON_SECONDS for due in times for clock in clocks)

    def _rest(self) -> None:
        for _ in range(STEPS_TO_REST):
            version = self.server.version
            self.surroundings_work()
            self.pass_time(1.0)
            if version == self.server.version:
                self.pass_time(QUIET_SECONDS)
                if version == self.server.version:
                    return
        raise AssertionError("It never comes to rest.")

    def resync(self) -> None:
        """Every operator looks over everything, as it does every few minutes."""
        for operator in self.alive:
            operator.resync()
        self.pass_time(15.0)

    def writes_during(self, happens: Callable[[], object]) -> list[Call]:
        """What operators write while something happens, and a little later."""
        before = {id(operator): len(operator.wire.written) for operator in self.operators}
        happens()
        self.pass_time(1.0)
        return [call for operator in self.operators for call in operator.wire.written[before.get(id(operator), 0) :]]

    def _watch_over(self, call: Call, sent: Sequence[Call]) -> None:
        try:
            self.witness(call, sent)
        except Exception as error:  # the operator would take it for an unforeseen error of its own
            self._wrong.append(error)

    def _uid(self, number: int) -> str:
        prefix = 0 if self.circumstances.same_uid_prefix else number
        return f"{prefix:08x}-0000-4000-8000-{number:012x}"

    def _admit(self, place: Place, raw: Raw) -> None:
        labels = raw["metadata"].get("labels") or {}
        if place.plural == "pytorchjobs" and self.circumstances.queued and KUEUE_QUEUE_LABEL in labels:
            raw["spec"]["runPolicy"]["suspend"] = True


@cache
def _settings(*, progress: bool) -> OperatorSettings:
    """An operator's; they are looked for in many places, which takes longer than a short life."""
    return OperatorSettings(
        default_output_uri="s3://models/team",
        progress_url="https://operator:8443" if progress else None,
        retry_base_seconds=2,
        retry_limit_seconds=8,
        group_end_seconds=5,
        pods_expected_seconds=5,
        concurrency=2,
    )


def _times(job: Raw) -> Iterator[datetime]:
    """When a job is over that still runs, and when one goes that has ended."""
    spec, status = job["spec"], job.get("status") or {}
    since, deadline = moment(status.get("activeSince")), spec.get("activeDeadlineSeconds")
    if since is not None and deadline is not None:
        yield since + timedelta(seconds=deadline - status.get("activeSeconds", 0))
    ended, ttl = moment(status.get("completionTime")), spec.get("ttlSecondsAfterFinished")
    if ended is not None and ttl is not None:
        yield ended + timedelta(seconds=ttl)


class _Errors(logging.Handler):
    """Notes what the operator logs as an error: it foresees whatever an API server says."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
