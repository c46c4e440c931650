"""The training loop: forward and backward over a step's packs, clip, step, log, evaluate, save.

One process and many run the same lines. Ranks meet twice in a step: to agree whether memory ran out or a stop was asked
for (`StepRunner.run`), and to sum their gradients (`Gradients.reduce`).

    python -m finetune_trainer job.yaml                                on this machine, a process for each of its GPUs
    FINETUNE_NPROC_PER_NODE=2 python -m finetune_trainer job.yaml      two processes
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.train.evaluation import Evaluation
from finetune_trainer.train.gradients import Gradients
from finetune_trainer.train.observer import StepFigures, TrainingObserver
from finetune_trainer.train.plan import TrainingPlan
from finetune_trainer.train.saver import Saver
from finetune_trainer.train.schedule import Schedule
from finetune_trainer.train.steps import StepRunner


@dataclass(frozen=True)
class Loop:
    """What the loop works with."""

    model: AdaptedModel
    plan: TrainingPlan
    schedule: Schedule
    runner: StepRunner
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    evaluation: Evaluation | None
    saver: Saver
    observer: TrainingObserver
    learning_rate: float
    """The highest."""
    max_grad_norm: float
    save_at: frozenset[int]
    """Steps, counted from 1, after which the model is evaluated and saved."""
    stop_asked: Callable[[], bool]
    """Whether this process was asked to stop."""


def train(loop: Loop, *, start: int = 0, eval_first: bool = False) -> bool:
    """Train to the end, or to a checkpoint when a stop is asked for; the value is then true.

    Args:
        loop: its parts are used up.
        start: steps that an earlier attempt has made.
        eval_first: evaluate before the first step too.

    Raises:
        JobError: LossDiverged, OutOfMemory, or as the store does.
    """
    figures = _Figures(loop.observer, lag=1 if loop.model.device.type == "cuda" else 0)
    loop.model.peft.train()
    loop.observer.begins(start, loop.plan.epoch_after(start))
    if eval_first and start == 0:
        _evaluate(loop, 0)
    for step in range(start, loop.plan.total_steps):
        loop.observer.step_begins()
        passed = loop.runner.run(step, stop=loop.stop_asked())  # this rank's packs, forwards and backwards
        loss = loop.gradients.reduce(passed.loss)  # [], per trained token of all ranks' rows; so are the gradients
        norm = loop.gradients.clip(loop.max_grad_norm)  # []
        rate = loop.learning_rate * loop.schedule.share(step)
        for group in loop.optimizer.param_groups:
            group["lr"] = rate
        loop.optimizer.step()

        done = step + 1
        stops = passed.stop and done < loop.plan.total_steps
        figures.add(StepFigures(done, loop.plan.epoch_after(done), rate, passed.tokens), loss, norm)
        if done in loop.save_at or stops:
            figures.settle()
            loop.saver.save(done, _evaluate(loop, done) if done in loop.save_at else {})
        if stops:
            return True
    return False


def _evaluate(loop: Loop, step: int) -> dict[str, float]:
    """Loss, perplexity and accuracy on the validation rows after `step` steps; nothing where there are none."""
    if loop.evaluation is None:
        return {}
    metrics = loop.evaluation.run(loop.runner.choice.batching)
    _check_finite("validation loss", metrics["eval_loss"], step)
    loop.observer.evaluated(step, loop.plan.epoch_after(step), metrics)
    return metrics


class _Figures:
    """What steps came to. On a GPU it is read one step later, when it has long been there: nothing waits for it."""

    def __init__(self, observer: TrainingObserver, *, lag: int) -> None:
        self._observer = observer
        self._lag = lag
        self._waiting: deque[tuple[StepFigures, torch.Tensor]] = deque()

    def add(self, figures: StepFigures, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Of a step that was just made; loss and norm of the gradient float32 []."""
        self._waiting.append((figures, torch.stack([loss, norm])))
        self._read(self._lag)

    def settle(self) -> None:
        """Read what waits."""
        self._read(0)

    def _read(self, left: int) -> None:
        while len(self._waiting) > left:
            figures, values = self._waiting.popleft()
            loss, norm = values.tolist()
            _check_finite("loss", loss, figures.step)
            _check_finite("gradient", norm, figures.step)
            self._observer.step_ends(figures, loss, norm)


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise JobError(
            Reason.LOSS_DIVERGED,
            f"The {what} became {value} at step {step}: lower learning_rate, raise num_warmup_steps or look for broken "
            "rows in the data.",
        )
