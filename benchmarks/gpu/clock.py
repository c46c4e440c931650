"""Takes the time of steps while transformers' own loop runs them.

The loop is the one that a job runs, so autocast, clipping, the optimizer, the schedule, logging and the making of
batches ahead of time are all in the figures. A step lasts from the end of the one before to its own, the device's work
included.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from typing_extensions import override

from benchmarks.gpu.devices import Memory, give_back, peak_memory, reset_peak, wait_for
from finetune_api.outcome import BatchLayout
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import Choice

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


class StepClock(TrainerCallback):
    """Watches one run of a trainer, and tells it which layout comes next.

    Args:
        planned: the steps of the run.
        device: what is trained on.
        padded_rows: rows of a padded batch.
    """

    def __init__(self, planned: list[Stage], device: torch.device, padded_rows: int) -> None:
        self.timed: list[TimedStep] = []
        self.choice: Choice | None = None
        self.choosing_seconds = 0.0
        """From the start of the loop to the choice: measuring what a row takes, the gate, compilation."""
        self.halvings: list[str] = []
        """Sentences about memory that ran out."""
        self._planned = planned
        self._device = device
        self._padded_rows = padded_rows
        self._data: Any = None  # the trainer's StepDataset
        self._batchings: dict[bool, Batching] = {}
        self._last = 0.0
        self._graphs = 0

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._data = kwargs["train_dataloader"].dataset
        self._graphs = counters["stats"]["unique_graphs"]
        self._last = time.perf_counter()

    def batching_chosen(self, choice: Choice, step: int) -> None:  # noqa: ARG002  the protocol's
        """As `BatchingObserver`."""
        wait_for(self._device)
        self.choosing_seconds = time.perf_counter() - self._last
        self.choice = choice
        padded = replace(choice.batching, layout=BatchLayout.PADDED, rows_per_batch=self._padded_rows)
        self._batchings = {False: choice.batching, True: padded}

    def batches_halved(self, sentence: str) -> None:
        """As `BatchingObserver`."""
        self.halvings.append(sentence)

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for(self._device)
        seconds = time.perf_counter() - self._last
        number, stage, batching = len(self.timed), self._planned[len(self.timed)], self._data.batching
        graphs = counters["stats"]["unique_graphs"]
        self.timed.append(TimedStep(number, stage, seconds, batching, peak_memory(self._device), graphs - self._graphs))
        self._graphs = graphs
        # Where memory ran out, smaller batches stay.
        self._batchings[stage.padded] = batching
        if number + 1 < len(self._planned) and self._planned[number + 1].padded != stage.padded:
            self._data.batching = self._batchings[not stage.padded]
            give_back(self._device)
        reset_peak(self._device)
        self._last = time.perf_counter()
