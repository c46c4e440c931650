"""Hugging Face's Trainer, changed where it would not do what the job says.

Its loop, optimizer, schedule, logging and integrations are used as they are. Ours are: one loader item per optimizer
step with the step's own count of trained tokens, so the loss is a true mean over accumulation and ranks; rows laid out
as the gate allows; a step that runs out of memory is made again in smaller parts; evaluation over every validation
token; checkpoints that are complete or absent; and a loss that is not a number ends the run instead of being logged
as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from typing_extensions import override

from finetune_api.outcome import CheckpointResult, Reason
from finetune_trainer.ahead import ahead
from finetune_trainer.errors import JobError
from finetune_trainer.model.batch import Batch
from finetune_trainer.model.loss import takes_logits_to_keep
from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.train import state as saved
from finetune_trainer.train.batching import RankBatches, StepBatches, StepDataset
from finetune_trainer.train.checkpoint import ADAPTER, Checkpoints
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.passes import Passes
from finetune_trainer.train.plan import TrainingPlan
from finetune_trainer.train.schedule import Schedule
from finetune_trainer.train.steps import BatchingObserver, StepRunner

_EVALUATED_BATCHES = 16
"""Batches of rows that are packed together in evaluations: enough to share beginnings, few enough to hold."""


@dataclass(frozen=True)
class Evaluation:
    """Validation rows and how they are batched."""

    rows: RankBatches
    rows_per_batch: int


class StepTrainer(Trainer):
    """Trains one job by its plan.

    Args:
        model: the PeftModel.
        args: transformers' arguments; accumulation is 1, because one item is one optimizer step.
        steps: item i is optimizer step i; its batching is what the choice begins with.
        plan: the order of rows.
        schedule: learning rates.
        evaluation: validation rows, or None.
        checkpoints: where checkpoints go (used by rank 0).
        ranks: this process among the others.
        scratch: an empty folder for files on their way out.
        callbacks: transformers callbacks.
        observer: is told about batches; None for nobody.
        checkpointing: whether activations are checkpointed, by `args` or FSDP; None to decide it by memory.
        sharded: by FSDP.
        start: digests of the adapter's tensors before the first step.
        earlier: `Choice.figures` of the attempt that is continued.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        steps: StepDataset,
        plan: TrainingPlan,
        schedule: Schedule,
        evaluation: Evaluation | None,
        checkpoints: Checkpoints,
        ranks: Ranks,
        scratch: Path,
        callbacks: list[TrainerCallback],
        observer: BatchingObserver | None = None,
        checkpointing: bool | None = None,
        sharded: bool = False,
        start: Mapping[str, str] | None = None,
        earlier: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=steps, callbacks=callbacks)
        self._steps = steps
        self._model = model
        # It prints raw dictionaries between our own lines.
        self.remove_callback(PrinterCallback)
        keep = takes_logits_to_keep(model.get_base_model())
        self._passes = Passes(self.accelerator, args.device, self.compute_loss_context_manager, keep=keep)
        self._runner = StepRunner(
            model,
            steps,
            self._passes,
            ranks,
            observer=observer,
            checkpointing=checkpointing,
            sharded=sharded,
            earlier=earlier,
        )
        self.sharded, self.start = sharded, dict(start or {})
        self._plan = plan
        self._rates = schedule
        self._evaluation = evaluation
        self._checkpoints = checkpoints
        self._ranks = ranks
        self._scratch = scratch
        self._upcoming: Iterator[StepBatches] | None = None
        self._eval_metrics: dict[str, float] | None = None
        self._evaluated_step: int | None = None
        self.last_checkpoint: CheckpointResult | None = None

    @property
    def peft_model(self) -> Any:
        """The PeftModel, not wrapped."""
        return self._model

    def choose_batching(self) -> Choice:
        """Decide how rows become batches, once, as soon as the model is wrapped."""
        return self._runner.choose(self.model_wrapped, self.state.global_step)

    # One item of the loader is one optimizer step.

    @override
    def get_train_dataloader(self) -> DataLoader[StepBatches]:
        """Items in the plan's order. Not prepared by accelerate, which would deal them out to the ranks again."""
        sampler = BatchSampler(SequentialSampler(self._steps), batch_size=1, drop_last=False)
        return DataLoader(self._steps, batch_sampler=sampler, collate_fn=_only_item)

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[StepBatches], num_batches: int, device: torch.device
    ) -> tuple[list[StepBatches], None]:
        """The next item; it brings its own count of trained tokens."""
        self.choose_batching()
        if self._upcoming is None:
            self._upcoming = ahead(item.to(device) for item in epoch_iterator)
        return list(islice(self._upcoming, num_batches)), None

    @override
    def training_step(  # type: ignore[override]  # the items are our loader's
        self, model: Any, inputs: StepBatches, num_items_in_batch: object = None
    ) -> torch.Tensor:
        """Forward and backward of one optimizer step, in smaller parts where memory runs out.

        Returns:
            float32 []: this rank's part of the loss times the number of ranks, so that its mean over the ranks (which
            DDP makes of gradients and transformers of losses) is the step's loss per trained token.

        Raises:
            JobError: OutOfMemory, a single row does not fit; LossDiverged.
        """
        model.train()
        total = self._runner.run(model, inputs)
        self.state.num_input_tokens_seen += inputs.tokens
        # On a GPU reading the number would stall the loop; there `log` sees it a few steps later.
        if self.args.device.type == "cpu":
            self._check_finite(total.item(), self.state.global_step + 1)
        return total

    @override
    def floating_point_ops(self, inputs: object) -> int:
        """Not estimated."""
        return 0

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise JobError(
                Reason.LOSS_DIVERGED,
                f"The loss became {loss} at step {step}: lower learning_rate, raise num_warmup_steps or look for "
                "broken rows in the data.",
            )

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures, unless the loss is not a number."""
        if "loss" in logs:
            self._check_finite(logs["loss"], self.state.global_step)
        super().log(logs, start_time)

    # Evaluation.

    @override
    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Loss per trained token, perplexity and token accuracy over all validation rows."""
        if self._evaluation is None:
            return {}
        if self._evaluated_step == self.state.global_step and self._eval_metrics is not None:
            return self._eval_metrics
        self.choose_batching()
        self._model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in ahead(self._eval_batches(self._evaluation)):
                with self._passes.forward(self.model_wrapped, batch) as found:
                    sums += torch.stack([part.double() for part in found])
        self._model.train()
        loss, correct = sums.tolist()
        loss, correct = self._ranks.sums([loss, correct])
        count = int(self._evaluation.rows.data.row_trained_tokens.sum())
        mean = loss / count
        self._check_finite(mean, self.state.global_step)
        # exp overflows above 709; a perplexity that large has no meaning.
        perplexity = math.exp(mean) if mean < 700 else math.inf
        metrics = {"eval_loss": mean, "eval_perplexity": perplexity, "eval_token_accuracy": correct / count}
        self._eval_metrics, self._evaluated_step = metrics, self.state.global_step
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_batches(self, evaluation: Evaluation) -> Iterator[Batch | Pack]:
        """This rank's batches, of some rows of all ranks after the other."""
        batching = replace(self._steps.batching, rows_per_batch=evaluation.rows_per_batch, length=None)
        together = evaluation.rows_per_batch * _EVALUATED_BATCHES * self._ranks.world_size
        rows = np.arange(len(evaluation.rows.data))
        for start in range(0, len(rows), together):
            yield from evaluation.rows.of(rows[start : start + together], batching)

    # Checkpoints.

    @override
    def _save_checkpoint(self, model: Any, trial: object) -> None:
        """Save everything a resume needs. Called by the loop on all ranks when a callback asks for it."""
        adapter = saved.adapter_state(self._model, model)
        optimizer = saved.optimizer_state(model, self.optimizer)
        random_states = self._ranks.gather(saved.random_state())
        if not self._ranks.is_first:
            return
        saved.refuse_not_finite(adapter, self.state.global_step)
        folder = self._scratch / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True)
        save_file(adapter, folder / ADAPTER, metadata={"format": "pt"})
        torch.save(optimizer, folder / saved.OPTIMIZER)
        torch.save(self._schedule().state_dict(), folder / saved.SCHEDULER)
        torch.save(random_states, folder / saved.RANDOM)
        self.state.save_to_json(str(folder / saved.TRAINER_STATE))
        evaluated = self._eval_metrics if self._evaluated_step == self.state.global_step else None
        self.last_checkpoint = self._checkpoints.save(
            folder,
            step=self.state.global_step,
            eval_loss=evaluated["eval_loss"] if evaluated else None,
            details={
                "metrics": evaluated or {},
                "epoch": self._plan.epoch_after(self.state.global_step),
                "batching": self.choose_batching().figures(),
            },
        )
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the adapter's weights were put in place before the model was wrapped."""

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        saved.load_optimizer_state(self.model_wrapped, self.optimizer, folder)
        self._schedule().load_state_dict(torch.load(folder / saved.SCHEDULER, weights_only=True))

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The job's learning rates."""
        if self.lr_scheduler is None:
            self.lr_scheduler = self._rates.of(optimizer or self.optimizer)
        return self.lr_scheduler

    def _schedule(self) -> Any:
        """The learning-rate schedule, which exists as soon as the loop has begun."""
        return self.lr_scheduler

    @override
    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved.load_random_state(Path(checkpoint), self._ranks)


class RunControl(TrainerCallback):
    """Says when to evaluate, save and stop.

    Args:
        plan: gives the epoch its true value.
        save_at: steps after which the model is evaluated and saved.
        stop_asked: whether this process was asked to stop. A signal may reach one rank only, so ranks agree each step.
        ranks: this process among the others.
    """

    def __init__(
        self, *, plan: TrainingPlan, save_at: frozenset[int], stop_asked: Callable[[], bool], ranks: Ranks
    ) -> None:
        self._plan = plan
        self._save_at = save_at
        self._stop_asked = stop_asked
        self._ranks = ranks
        self.stopped = False

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step, before it is logged."""
        state.epoch = self._plan.epoch_after(state.global_step)
        if state.global_step in self._save_at:
            control.should_evaluate = control.should_save = True
        if state.global_step < self._plan.total_steps and self._ranks.any(self._stop_asked()):
            self.stopped = control.should_save = control.should_training_stop = True


def _only_item(items: list[StepBatches]) -> StepBatches:
    return items[0]
