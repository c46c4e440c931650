"""Runs an optimizer step's forward and backward passes, and makes it again in smaller parts where memory runs out.

Smaller parts are the same mathematics. With several processes all ranks take them together, or gradients of different
rows would be added up.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.launch.failures import out_of_memory
from finetune_trainer.model.batch import Batch
from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.train import state as saved
from finetune_trainer.train.batching import Batching, StepBatches, StepDataset
from finetune_trainer.train.choice import Choice, Chooser, checkpoint_activations
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.passes import Passes

_PROVING_STEPS = 3
"""Steps after which memory is known to suffice. With several processes only these can be made again: later ones reduce
gradients while they are computed, and a rank that has run out of memory would leave the others waiting."""

_GATE_ROWS = 64
"""Rows among which the gate looks for its sample."""


class BatchingObserver(Protocol):
    """Is told how rows become batches."""

    def batching_chosen(self, choice: Choice, step: int) -> None:
        """Before the first step of this attempt, which is number `step` counted from 0."""

    def batches_halved(self, sentence: str) -> None:
        """A step ran out of memory and goes on in smaller parts."""


class StepRunner:
    """Runs the steps of one job on this rank.

    Args:
        model: the PeftModel, not wrapped.
        steps: whose batching is decided here.
        passes: run them.
        ranks: this process among the others.
        observer: is told about batches; None for nobody.
        checkpointing: whether activations are checkpointed already; None to decide it by memory.
        sharded: by FSDP.
        earlier: `Choice.figures` of the attempt that is continued.
    """

    def __init__(
        self,
        model: Any,
        steps: StepDataset,
        passes: Passes,
        ranks: Ranks,
        *,
        observer: BatchingObserver | None,
        checkpointing: bool | None,
        sharded: bool,
        earlier: dict[str, Any] | None,
    ) -> None:
        self._model = model
        self._steps = steps
        self._passes = passes
        self._ranks = ranks
        self._observer = observer
        self._checkpointing = checkpointing
        self._sharded = sharded
        self._earlier = earlier
        self._choice: Choice | None = None
        self._made = 0

    def choose(self, wrapped: Any, step: int) -> Choice:
        """Decide how rows become batches, once.

        Args:
            wrapped: the model as training runs it.
            step: optimizer steps made so far.
        """
        if self._choice is None:
            chooser = Chooser(
                self._model,
                wrapped,
                self._passes,
                self._ranks,
                checkpointing=self._checkpointing,
                sharded=self._sharded,
            )
            self._choice = chooser.choose(
                self._steps.first_rows(_GATE_ROWS),
                self._steps.batching,
                longest=int(self._steps.rows.data.row_tokens.max()),
                earlier=self._earlier,
            )
            self._steps.batching = self._choice.batching
            if self._observer is not None:
                self._observer.batching_chosen(self._choice, step)
        return self._choice

    def run(self, model: Any, item: StepBatches) -> torch.Tensor:
        """This rank's part of a step's mean loss times the number of ranks, float32 []; see `StepTrainer`.

        Args:
            model: as training runs it.
            item: the step.

        Raises:
            JobError: OutOfMemory, a single row does not fit.
        """
        if item.batching != self._steps.batching:
            # Made before memory ran out, in larger parts.
            item = self._steps[item.step]
        while (total := self._attempt(model, item)) is None:
            item = self._steps[item.step]
        self._made += 1
        return total

    def _attempt(self, model: Any, item: StepBatches) -> torch.Tensor | None:
        """None when a rank ran out of memory: the next attempt uses less."""
        scale = self._ranks.world_size / max(item.trained_tokens, 1)
        alone = self._ranks.world_size == 1
        if not alone and (self._sharded or self._made >= _PROVING_STEPS):
            return self._passes(model, item.batches, scale)
        generators = saved.random_state()
        total, trouble = None, None
        try:
            total = self._passes(model, item.batches, scale, reduce=alone)
        except (RuntimeError, MemoryError) as error:
            trouble = out_of_memory(error, self._ranks.rank)
            if trouble is None:
                raise
        if not self._ranks.any(trouble is not None):
            if not alone:
                self._average_gradients()
            return total
        del total
        model.zero_grad()
        self._use_less(model, item, trouble)
        saved.set_random_state(generators)
        return None

    def _average_gradients(self) -> None:
        """What DDP does while gradients are computed."""
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self._ranks.world_size

    def _use_less(self, model: Any, item: StepBatches, trouble: tuple[Reason, str] | None) -> None:
        """Halve the batches or, where a single row does not fit, checkpoint activations; on all ranks."""
        gc.collect()
        if self._passes.device.type == "cuda":
            torch.cuda.empty_cache()
        choice = self.choose(model, item.step)
        if not self._ranks.any(trouble is not None and _is_single_row(item.batches[0])):
            smaller, what = self._halved(item)
            choice = replace(choice, batching=smaller)
        elif self._checkpointing is None and not choice.checkpointing and checkpoint_activations(self._model):
            choice, what = replace(choice, checkpointing=True), "activations computed again in the backward pass"
        else:
            raise JobError(*next(found for found in self._ranks.gather(trouble) if found is not None))
        self._choice, self._steps.batching = choice, choice.batching
        if self._observer is not None:
            self._observer.batches_halved(f"Memory ran out at step {item.step + 1}: it goes on with {what}.")

    def _halved(self, item: StepBatches) -> tuple[Batching, str]:
        batching = item.batching
        if not batching.packs:
            rows = max(1, batching.rows_per_batch // 2)
            return replace(batching, rows_per_batch=rows), f"{rows} rows at a time"
        # The largest pack may be far below what is allowed.
        largest = max(self._ranks.gather(max(pack.tokens for pack in item.batches if isinstance(pack, Pack))))
        tokens = min(batching.tokens_per_pack, largest) // 2
        return replace(batching, tokens_per_pack=tokens), f"packs of at most {tokens:,} tokens"


def _is_single_row(batch: Batch | Pack) -> bool:
    return batch.tokens == batch.longest if isinstance(batch, Pack) else len(batch.input_ids) == 1
