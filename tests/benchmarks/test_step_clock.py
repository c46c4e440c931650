"""The GPU benchmark's clock: where a step ends, whenever the loop tells of it, and which layout comes next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.clock import Stage, StepClock
from finetune_api.outcome import BatchLayout
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.gate import Verdict
from finetune_trainer.train.observer import StepFigures

PACKED = Batching(BatchLayout.SHARED_PREFIX, tokens_per_pack=64, rows_per_batch=8, pad_id=0)


class Watched:
    """A clock that watches a loop which computes nothing.

    Args:
        padded: the layout of each step.
    """

    def __init__(self, *padded: bool) -> None:
        self.now = 0.0
        self.takes_packs = True
        stages = [Stage(0, padded=each, measured=True) for each in padded]
        self.clock = StepClock(stages, torch.device("cpu"), padded_rows=2, clock=lambda: self.now)
        choice = Choice(PACKED, 0, Verdict(BatchLayout.SHARED_PREFIX))
        model = SimpleNamespace(take_packs=lambda: self._take(True), leave_packs=lambda: self._take(False))
        self.runner = SimpleNamespace(choice=choice)
        loop: Any = SimpleNamespace(runner=self.runner, model=model)

        def make_loop(observer: Any) -> Any:
            self.now += 5
            observer.batching_chosen(choice, 0)
            return loop

        self.clock.watch(make_loop)

    def play(self, *events: str | float) -> None:
        """Let the loop tell of these: "begins", "1 ends" for the first step, or a number of seconds that pass."""
        for event in events:
            if isinstance(event, str) and event == "begins":
                self.clock.step_begins()
            elif isinstance(event, str):
                self.clock.step_ends(StepFigures(int(event.split()[0]), 0.0, 1e-3, tokens=10), 1.0, 1.0)
            else:
                self.now += event

    def _take(self, packs: bool) -> None:
        self.takes_packs = packs


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(["begins", 2, "1 ends", "begins", 3, "2 ends", 100], id="a CPU tells at once"),
        pytest.param(["begins", 2, "begins", 1, "1 ends", 2, "2 ends", 100], id="a GPU tells in the next step"),
        pytest.param(["begins", 2, "1 ends", 100, "begins", 3, "2 ends"], id="a step is told before it is saved"),
    ],
)
def test_a_step_lasts_until_its_own_end_whenever_the_loop_tells_of_it(events: list[str | float]) -> None:
    watched = Watched(False, False)

    watched.play(*events)

    assert [(step.number, step.seconds) for step in watched.clock.timed] == [(0, 2), (1, 3)]
    assert watched.clock.choosing_seconds == 5


def test_between_steps_the_layout_changes_and_with_it_what_the_model_takes() -> None:
    watched, seen = Watched(False, True, True, False), []

    for step in range(4):
        watched.play("begins")
        batching = watched.runner.choice.batching
        seen.append((batching.layout, batching.rows_per_batch, watched.takes_packs))
        watched.play(1, f"{step + 1} ends")

    packed, padded = (BatchLayout.SHARED_PREFIX, 8, True), (BatchLayout.PADDED, 2, False)
    assert seen == [packed, padded, padded, packed]
    assert [step.batching.layout for step in watched.clock.timed] == [layout for layout, *_ in seen]


def test_batches_that_were_halved_stay_so_when_their_layout_comes_again() -> None:
    watched = Watched(False, True, False)

    watched.play("begins")
    smaller = PACKED.halved(64)
    watched.runner.choice = Choice(smaller, 0, watched.runner.choice.verdict)
    watched.play(1, "1 ends", "begins", 1, "2 ends", "begins", 1, "3 ends")

    assert [step.batching.tokens_per_pack for step in watched.clock.timed] == [32, 64, 32]
