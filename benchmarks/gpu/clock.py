"""Takes the time of steps while the trainer's own loop runs them.

The loop is the one that a job runs, so autocast, clipping, the optimizer, the schedule, reports and the making of
batches ahead of time are all in the figures; saving is not. A step lasts until the device has done all of it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch._dynamo.utils import counters
from typing_extensions import override

from benchmarks.gpu.devices import Memory, give_back, peak_memory, reset_peak, wait_for
from finetune_api.outcome import BatchLayout
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.console import Console
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.observer import StepFigures, TrainingObserver
from finetune_trainer.train.progress import ProgressReporter

_TURNS = 2
"""How often each layout has its turn."""


@dataclass(frozen=True)
class Stage:
    """One step of the run."""

    rows_of: int
    """The step of the plan that gives its rows."""
    padded: bool
    """Our padded layout, instead of the one that the gate chose."""
    measured: bool
    """Else it warms up what is measured next; batches made ahead for the layout before are made again in it."""


def stages(*, warm_up: int, steps: int, compare: bool) -> list[Stage]:
    """The steps of a run: turns of `warm_up` steps and some measured ones, which are `steps` in all for each layout."""
    turns = min(_TURNS, steps) if compare else 1
    found = []
    for turn in range(turns):
        measured = range(warm_up + steps * turn // turns, warm_up + steps * (turn + 1) // turns)
        for padded in (False, True) if compare else (False,):
            found += [Stage(number, padded, measured=False) for number in range(warm_up)]
            found += [Stage(number, padded, measured=True) for number in measured]
    return found


@dataclass(frozen=True)
class TimedStep:
    """What was seen of one step."""

    number: int
    """In the run, counted from 0."""
    stage: Stage
    seconds: float
    batching: Batching
    """As it was at the end of the step, in which memory may have run out."""
    memory: Memory | None
    graphs: int
    """Graphs that torch.compile made in it."""


class StepClock(TrainingObserver):
    """Watches one run of the training loop, and switches it to the layout that comes next.

    Args:
        planned: the steps of the run.
        device: what is trained on.
        padded_rows: rows of a padded batch.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        planned: list[Stage],
        device: torch.device,
        padded_rows: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(
            reporter=ProgressReporter(None), console=Console(io.StringIO()), metrics_log=None, total_steps=len(planned)
        )
        self.timed: list[TimedStep] = []
        self.choice: Choice | None = None
        self.choosing_seconds = 0.0
        """From the start to the choice: measuring what a row takes, the gate, compilation."""
        self.halvings: list[str] = []
        """Sentences about memory that ran out."""
        self._planned = planned
        self._device = device
        self._padded_rows = padded_rows
        self._seconds_now = clock
        self._loop: Loop | None = None
        self._batchings: dict[bool, Batching] = {}
        self._last = 0.0
        self._graphs = 0
        self._begun = 0
        """Steps."""

    def watch(self, make_loop: Callable[[TrainingObserver], Loop]) -> Loop:
        """The loop that is made for this observer; how rows become batches is decided in `make_loop`.

        Raises:
            JobError: as `make_loop` does.
        """
        self._graphs = counters["stats"]["unique_graphs"]
        self._last = self._seconds_now()
        self._loop = make_loop(self)
        return self._loop

    @override
    def batching_chosen(self, choice: Choice, step: int) -> None:
        wait_for(self._device)
        self.choosing_seconds = self._seconds_now() - self._last
        super().batching_chosen(choice, step)
        self.choice = choice
        padded = replace(choice.batching, layout=BatchLayout.PADDED, rows_per_batch=self._padded_rows)
        self._batchings = {False: choice.batching, True: padded}

    @override
    def batches_halved(self, sentence: str) -> None:
        super().batches_halved(sentence)
        self.halvings.append(sentence)

    @override
    def step_begins(self) -> None:
        super().step_begins()
        # On a GPU the loop hears of a step only when it has given the next one away.
        self._end_step()
        self._begun += 1
        self._last = self._seconds_now()

    @override
    def step_ends(self, figures: StepFigures, loss: float, grad_norm: float) -> None:
        super().step_ends(figures, loss, grad_norm)
        if figures.step == self._begun:
            self._end_step()

    def _end_step(self) -> None:
        """Note the step under way, if there is one, and make ready for the next."""
        if len(self.timed) == self._begun or self._loop is None:
            return
        wait_for(self._device)
        seconds = self._seconds_now() - self._last
        number, graphs = len(self.timed), counters["stats"]["unique_graphs"]
        stage, batching = self._planned[number], self._loop.runner.choice.batching
        self.timed.append(TimedStep(number, stage, seconds, batching, peak_memory(self._device), graphs - self._graphs))
        self._graphs = graphs
        # Where memory ran out, smaller batches stay.
        self._batchings[stage.padded] = batching
        if number + 1 < len(self._planned) and self._planned[number + 1].padded != stage.padded:
            _lay_out(self._loop, self._batchings[not stage.padded])
            give_back(self._device)
        reset_peak(self._device)


def _lay_out(loop: Loop, batching: Batching) -> None:
    """Let rows become batches so from the next step on; the layout is not the one before."""
    loop.runner.choice = replace(loop.runner.choice, batching=batching)
    # Attention that is made for packs takes nothing else.
    if batching.packs:
        loop.model.take_packs()
    else:
        loop.model.leave_packs()
