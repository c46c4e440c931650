"""An operator that things happen to, and jobs that ought to live as if nothing had: history and end are compared.

The life that others are compared with is lived twice: what differs between the two proves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.cluster.api import wait_until
from tests.cluster.operator_process import OperatorProcess
from tests.faults.fault_proxy import FaultProxy
from tests.faults.fault_table import FaultTable, Row
from tests.faults.stage import Stage
from tests.faults.stories import STORIES


@dataclass(frozen=True)
class Life:
    """How a job lives when nothing happens to it."""

    writes: Sequence[tuple[str, str]]
    """Verb and resource of the operator's writes, in their order."""
    ending: str
    history: Sequence[str]


@dataclass(frozen=True)
class Theatre:
    """All that a comparison needs."""

    stage: Stage
    operator: OperatorProcess
    proxy: FaultProxy
    table: FaultTable
    lives: dict[str, Life]
    """Those that are known, by their stories: nothing in one depends on when or where it is lived."""

    def undisturbed(self, *names: str) -> dict[str, Life]:
        """The lives that others are compared with, by the names of their stories."""
        pairs = {name: [f"life-{place}-one", f"life-{place}-two"] for place, name in enumerate(names)}
        unknown = {name: pair for name, pair in pairs.items() if name not in self.lives}
        self.stage.play(*((STORIES[name], self.stage.begin(STORIES[name], pair)) for name, pair in unknown.items()))
        for name, pair in unknown.items():
            self.lives[name] = self.life_of(*pair)
        return {name: self.lives[name] for name in names}

    def life_of(self, first: str, second: str) -> Life:
        """How these two jobs have lived.

        Raises:
            AssertionError: in different ways.
        """
        endings = wait_until(
            lambda: [self.stage.ending(name) for name in (first, second)], lambda seen: seen[0] and seen[0] == seen[1]
        )
        histories = wait_until(
            lambda: [self.stage.history(name) for name in (first, second)], lambda seen: seen[0] == seen[1]
        )
        writes = max((self.proxy.changes(name) for name in (first, second)), key=len)
        return Life([(verb, resource) for verb, resource, _, _ in writes], endings[0], histories[0])

    def compare(self, case: str, names: Mapping[str, Sequence[str]], life: Life, *, since: float) -> None:
        """The jobs have ended as the undisturbed one did, and what was created and deleted on the way is the same.

        Args:
            case: which of the published cases, or what else this is.
            names: what was done to the operator -> the jobs that lived with it.
            life: that of an undisturbed job.
            since: monotonic seconds of the beginning.

        Raises:
            AssertionError: they have not.
        """
        endings = self.stage.wait_endings([name for mine in names.values() for name in mine], life.ending)
        histories = {name: self.stage.history(name) for name in endings}
        for injected, mine in names.items():
            same_history = all(histories[name] == life.history for name in mine)
            same_end = all(endings[name] == life.ending for name in mine)
            row = Row(case, injected, len(mine), same_history, same_end, time.monotonic() - since)
            self.table.add(row)
        for name, ending in endings.items():
            assert ending.splitlines() == life.ending.splitlines(), (case, name)
            assert histories[name] == life.history, (case, name)

    def nothing_left(
        self, case: str, names: Mapping[str, Sequence[str]], *, since: float, stage: Stage | None = None
    ) -> None:
        """The jobs are gone, and whatever was created for them was deleted.

        Args:
            case: as of `compare`.
            names: as of `compare`.
            since: as of `compare`.
            stage: where they lived, if that is another namespace.

        Raises:
            AssertionError: something is left.
        """
        stage = stage or self.stage
        all_names = [name for mine in names.values() for name in mine]
        left = wait_until(lambda: {name: stage.left(name) for name in all_names}, lambda seen: not any(seen.values()))
        for injected, mine in names.items():
            none = not any(left[name] for name in mine)
            self.table.add(Row(case, injected, len(mine), none, none, time.monotonic() - since))
