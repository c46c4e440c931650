"""Listens to transformers' Trainer and tells the three who want to know: the console, metrics.jsonl and the operator.

Everything that is said about a running training goes through here, on global rank 0 only.
"""

# ruff: noqa: ARG002  the signatures are transformers'

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.train.choice import Choice
from finetune_trainer.train.console import Console
from finetune_trainer.train.metrics_log import MetricsLog, measured
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.progress_status import Phase, Progress, percent_done, remaining_seconds

STEP_FIGURES = ("loss", "learning_rate", "grad_norm")


class TrainingObserver(TrainerCallback):
    """Reports steps, evaluations and the pace; to be made on global rank 0 only, as is the metrics log.

    Tokens per second come from the logs (`tokens_per_second`) when the Trainer puts them there, else from its count of
    input tokens (`include_num_input_tokens_seen`) over the time spent in steps; evaluation and saving do not count.
    `logging_nan_inf_filter` has to be off, or transformers replaces a NaN loss by an older one before it is seen here.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        reporter: ProgressReporter,
        console: Console,
        metrics_log: MetricsLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reporter = reporter
        self._console = console
        self._metrics_log = metrics_log
        self._clock = clock
        self._first_step: int | None = None
        self._began_at = 0.0
        self._step_began_at = 0.0
        self._busy_seconds = 0.0
        self._tokens_seen = 0
        self._figures: dict[str, float | None] = {}
        self._batching: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loop is about to start, at `state.global_step` of an earlier attempt after a resume."""
        if state.is_world_process_zero:
            self._report(state)

    def batching_chosen(self, choice: Choice, step: int) -> None:
        """How rows become batches from optimizer step `step` on."""
        if (warning := choice.warning()) is not None:
            self._console.warning(warning)
        self._console.phase(choice.sentence())
        self._metrics_log.append(step, epoch=None, values=choice.figures())
        self._batching = choice.batching.layout.value

    def batches_halved(self, sentence: str) -> None:
        """A step ran out of memory and goes on in smaller parts."""
        self._console.warning(sentence)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where this attempt began: its pace is measured from here, an evaluation before it not included."""
        self._step_began_at = self._clock()
        if self._first_step is None:
            self._first_step, self._began_at = state.global_step, self._step_began_at
            self._tokens_seen = state.num_input_tokens_seen

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An optimizer step is done."""
        self._busy_seconds += self._clock() - self._step_began_at
        if state.is_world_process_zero:
            self._report(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **kwargs: Any,
    ) -> None:
        """Figures of the last steps; logs without a loss (evaluations, the summary at the end) come by other ways."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        values: dict[str, object] = {name: logs[name] for name in STEP_FIGURES if name in logs}
        values["tokens_per_second"] = logs.get("tokens_per_second", self._pace(state))
        self._metrics_log.append(state.global_step, epoch=state.epoch, values=values)
        self._figures.update({name: measured(value) for name, value in values.items()})
        self._report(state)
        self._console.step(
            state.global_step,
            state.max_steps,
            loss=measured(logs["loss"]),
            learning_rate=self._figures.get("learning_rate"),
            tokens_per_second=self._figures["tokens_per_second"],
            remaining_seconds=self._remaining_seconds(state),
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, object] | None = None,
        **kwargs: Any,
    ) -> None:
        """Figures of one evaluation: eval_loss and, where measured, eval_perplexity and eval_token_accuracy."""
        if not state.is_world_process_zero or metrics is None:
            return
        values = {name: value for name, value in metrics.items() if name.startswith("eval_")}
        self._metrics_log.append(state.global_step, epoch=state.epoch, values=values)
        self._figures["eval_loss"] = measured(values.get("eval_loss"))
        self._report(state)
        self._console.evaluation(
            state.global_step,
            state.max_steps,
            loss=self._figures["eval_loss"],
            perplexity=measured(values.get("eval_perplexity")),
            token_accuracy=measured(values.get("eval_token_accuracy")),
        )

    def _report(self, state: TrainerState) -> None:
        self._reporter.update(
            Progress(
                phase=Phase.RUNNING,
                percent=percent_done(state.global_step, state.max_steps),
                step=state.global_step,
                total_steps=state.max_steps,
                epoch=round(state.epoch, 4),
                batching=self._batching,
                loss=self._figures.get("loss"),
                eval_loss=self._figures.get("eval_loss"),
                learning_rate=self._figures.get("learning_rate"),
                tokens_per_second=self._figures.get("tokens_per_second"),
                remaining_seconds=self._remaining_seconds(state),
            )
        )

    def _remaining_seconds(self, state: TrainerState) -> float | None:
        if self._first_step is None:
            return None
        return remaining_seconds(
            first_step=self._first_step,
            step=state.global_step,
            total_steps=state.max_steps,
            elapsed_seconds=self._clock() - self._began_at,
        )

    def _pace(self, state: TrainerState) -> float | None:
        seen, self._tokens_seen = self._tokens_seen, state.num_input_tokens_seen
        busy, self._busy_seconds = self._busy_seconds, 0.0
        if self._tokens_seen <= seen or busy <= 0:
            return None
        return (self._tokens_seen - seen) / busy
