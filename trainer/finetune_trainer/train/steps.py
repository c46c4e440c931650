"""Forward and backward passes of optimizer steps on this rank, made again in smaller parts where memory runs out.

Smaller parts are the same mathematics. All ranks take them together, before any gradient is sent: else gradients of
different rows would be added up. How rows become batches is held here and nowhere else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from finetune_api.outcome import Reason
from finetune_trainer.data.dataset import TokenizedData
from finetune_trainer.errors import JobError
from finetune_trainer.launch.failures import out_of_memory
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import TokenPair
from finetune_trainer.model.prefix_tree import AnyBatch
from finetune_trainer.train import state as saved
from finetune_trainer.train.batching import Batching, RankBatches, is_single_row, tokens_of
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.gradients import Gradients
from finetune_trainer.train.plan import TrainingPlan


class BatchingObserver(Protocol):
    """Is told how rows become batches."""

    def batching_chosen(self, choice: Choice, step: int) -> None:
        """Before the first step of this attempt, which is number `step` counted from 0."""

    def batches_halved(self, sentence: str) -> None:
        """Memory ran out, and it goes on in smaller parts."""


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes for one optimizer step."""

    step: int
    """Counted from 0."""
    batching: Batching
    batches: list[AnyBatch]
    """At least one."""
    trained_tokens: int
    """Targets of the step over all ranks."""
    tokens: int
    """Tokens of the step over all ranks: every row's own, padding not counted."""


@dataclass(frozen=True)
class Passed:
    """What the passes of a step on this rank came to."""

    loss: torch.Tensor
    """float32 []: this rank's part of the loss per trained token."""
    tokens: int
    """As in StepBatches."""
    stop: bool
    """Whether a rank was asked to stop."""


class StepRunner:
    """Runs the steps of one job on this rank.

    Args:
        model: is trained, ready for what was chosen.
        rows: this rank's share of the training rows.
        plan: which rows each step has.
        choice: how they become batches, to begin with.
        gradients: where they are added up.
        ranks: this process among the others.
        observer: is told about batches; None for nobody.
        bound_packs: lets the next attempt make smaller packs.
    """

    def __init__(
        self,
        model: AdaptedModel,
        rows: RankBatches,
        plan: TrainingPlan,
        choice: Choice,
        gradients: Gradients,
        ranks: Ranks,
        observer: BatchingObserver | None = None,
        bound_packs: Callable[[int], None] | None = None,
    ) -> None:
        self.choice = choice
        self._model = model
        self._rows = rows
        self._plan = plan
        self._gradients = gradients
        self._ranks = ranks
        self._observer = observer
        self._bound_packs = bound_packs
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: Future[StepBatches] | None = None

    def batches(self, step: int) -> StepBatches:
        """What this rank computes for `step`, counted from 0."""
        rows, data, batching = self._plan.rows_of_step(step), self._rows.data, self.choice.batching
        return StepBatches(
            step,
            batching,
            [batch.to(self._model.device) for batch in self._rows.of(rows, batching)],
            trained_tokens=int(data.row_trained_tokens[rows].sum()),
            tokens=int(data.row_tokens[rows].sum()),
        )

    def run(self, step: int, *, stop: bool = False) -> Passed:
        """Add up this rank's gradients of `step`.

        Args:
            step: counted from 0.
            stop: this process was asked to stop. A signal may reach one rank only, so ranks agree.

        Raises:
            JobError: OutOfMemory, a single row does not fit.
        """
        while True:
            item = self._taken(step)
            generators = saved.random_state()
            self._gradients.zero()
            loss, trouble = None, None
            try:
                loss = self._model.backward(item.batches, 1 / max(item.trained_tokens, 1))
            except (RuntimeError, MemoryError) as error:
                trouble = out_of_memory(error, self._ranks.rank)
                if trouble is None:
                    raise
                if self._model.sharded:
                    raise self._out_of_memory_while_sharing(item, trouble) from error
            ran_out, stop = self._ranks.any_of(trouble is not None, stop)
            if not ran_out and loss is not None:
                return Passed(loss, item.tokens, stop)
            del loss
            self._use_less(item, trouble)
            saved.set_random_state(generators)

    def _taken(self, step: int) -> StepBatches:
        """The batches of `step`, which a thread has made while the step before was computed; it makes the next ones."""
        made = self._next.result() if self._next is not None else None
        self._next = None
        if made is None or (made.step, made.batching) != (step, self.choice.batching):
            made = self.batches(step)
        if step + 1 < self._plan.total_steps:
            self._next = self._thread.submit(self.batches, step + 1)
        return made

    def _out_of_memory_while_sharing(self, item: StepBatches, trouble: tuple[Reason, str]) -> JobError:
        """The others wait for this rank's part of the weights, so only another attempt can take smaller packs."""
        batching = item.batching
        if self._bound_packs is None or not batching.packs or is_single_row(item.batches[0]):
            return JobError(*trouble)
        smaller = batching.halved(max(tokens_of(batch) for batch in item.batches))
        self._bound_packs(smaller.tokens_per_pack)
        return JobError(
            Reason.PACKS_TOO_LARGE,
            f"Rank {self._ranks.rank} ran out of memory at step {item.step + 1}, with {batching.bound()}; processes "
            f"that share the model cannot make the step again: the next attempt takes {smaller.bound()}.",
        )

    def _use_less(self, item: StepBatches, trouble: tuple[Reason, str] | None) -> None:
        """Halve the batches or, where a single row does not fit, checkpoint activations; on all ranks."""
        free_memory(self._model.device)
        choice = self.choice
        if not self._ranks.any(trouble is not None and is_single_row(item.batches[0])):
            largest = max(self._ranks.gather(max(tokens_of(batch) for batch in item.batches)))
            choice = replace(choice, batching=choice.batching.halved(largest))
            what = choice.batching.bound()
        elif choice.may_checkpoint and choice.checkpointed != 1 and self._model.checkpoint_activations():
            choice, what = replace(choice, checkpointed=1), "activations computed again in the backward pass"
        else:
            raise JobError(*next(found for found in self._ranks.gather(trouble) if found is not None))
        self.choice = choice
        if self._observer is not None:
            self._observer.batches_halved(f"Memory ran out at step {item.step + 1}: it goes on with {what}.")


def free_memory(device: torch.device) -> None:
    """Give back what a failed pass left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_rows(data: TokenizedData, plan: TrainingPlan, count: int) -> list[list[TokenPair]]:
    """Up to `count` rows as the first epoch begins with them, the same on all ranks."""
    steps = range(min(plan.total_steps, -(-count // plan.rows_per_step)))
    rows = np.concatenate([plan.rows_of_step(step) for step in steps])[:count]
    return [data.sequences(int(row)) for row in rows]
