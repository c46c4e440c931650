"""Faults that concern single jobs: many live side by side, and the requests about each of them fail in another way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.faults.calls import Call
from tests.faults.fault_proxy import FaultProxy
from tests.faults.faults import Fate, Garbled, Refusal

Concerns = Callable[[Call], bool]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the first requests of a kind."""

    concerns: Concerns
    how: Refusal | Fate | Garbled
    count: int = 1
    done: bool = False
    """The server has carried the request out before its answer is lost. So it has where that is garbled."""

    @property
    def comes_after(self) -> bool:
        """Whether it befalls the answer."""
        return self.done or isinstance(self.how, Garbled) or self.how is Fate.STALL


class Injection:
    """Injects one fault into each job's life.

    Args:
        faults: by the names of the jobs.
    """

    def __init__(self, faults: Mapping[str, Fault]) -> None:
        self._faults = faults
        self.counts: Counter[str] = Counter()
        """How often it happened, by job."""
        self.times: dict[str, list[float]] = {name: [] for name in faults}
        """Monotonic seconds."""

    def into(self, proxy: FaultProxy) -> None:
        """From now on."""
        proxy.refuse, proxy.after_answer = self._refuse, self._after_answer

    def _refuse(self, call: Call) -> Refusal | Fate | None:
        how = self._happens(call, after=False)
        return None if isinstance(how, Garbled) else how

    def _after_answer(self, call: Call, code: int) -> Fate | Garbled | None:
        how = self._happens(call, after=True) if code < 400 else None
        return None if isinstance(how, Refusal) else how

    def _happens(self, call: Call, *, after: bool) -> Refusal | Fate | Garbled | None:
        fault = self._faults.get(call.job)
        if fault is None or fault.comes_after != after or not fault.concerns(call):
            return None
        if self.counts[call.job] >= fault.count:
            return None
        self.counts[call.job] += 1
        self.times[call.job].append(time.monotonic())
        return fault.how


def anything(call: Call) -> bool:
    """All requests."""
    return True


def asks(verb: str, resource: str) -> Concerns:
    """Requests of that kind."""
    return lambda call: (call.verb, call.resource) == (verb, resource)


def writes_status(call: Call) -> bool:
    """Requests that write a job's status."""
    return call.resource == "finetunejobs/status"
