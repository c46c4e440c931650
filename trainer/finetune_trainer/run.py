"""A job from its first fetch to its published adapter, in the order a reader would expect."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune_api.job import FineTuneJob
from finetune_api.outcome import BatchLayout, Reason, TerminationMessage
from finetune_trainer.job_output import open_output
from finetune_trainer.launch.failures import stopped_sentence
from finetune_trainer.load_adapted import is_sharded, load_adapted
from finetune_trainer.model.lora import adapted, trainable_parameters
from finetune_trainer.preparation import Prepared, Surroundings, prepare_run
from finetune_trainer.publish.publication import publish_best
from finetune_trainer.signals import StopFlag, stop_at_once
from finetune_trainer.train.arguments import choose_checkpointing, training_arguments
from finetune_trainer.train.batching import Batching, RankBatches, StepDataset
from finetune_trainer.train.callbacks import TrainingObserver
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.console import Console
from finetune_trainer.train.metrics_log import MetricsLog
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.schedule import steps_to_save
from finetune_trainer.train.steps import BatchingObserver
from finetune_trainer.train.trainer import Evaluation, RunControl, StepTrainer


def run_job(job: FineTuneJob, notices: list[str], device: torch.device, ranks: Ranks) -> TerminationMessage:
    """Run the effective `job` on this rank.

    Args:
        job: with all defaults filled in.
        notices: what the user was told about the job already, for the report.
        device: what this rank trains on.
        ranks: this rank among the others.

    Raises:
        JobError: whatever is foreseen to go wrong.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="finetune-") as scratch:
        around = _surroundings(job, ranks, Path(scratch))
        try:
            # Until training starts nothing would be lost, so a stop ends the run at once.
            with stop_at_once():
                around.reporter.start()
                prepared = prepare_run(job, notices, around, device)
                if isinstance(prepared, TerminationMessage):
                    return prepared
            # From here on a stop waits for the step under way and a checkpoint.
            with StopFlag() as stop:
                trainer, stopped = _train(job, prepared, around, device, stop.is_set)
                if stopped:
                    return _stopped(trainer)
                result = TerminationMessage(succeeded=True, rank=ranks.rank)
                if ranks.is_first:
                    result = publish_best(job, prepared, around, trainer, time.monotonic() - started)
                ranks.barrier()
                return result
        finally:
            around.reporter.close()


def _surroundings(job: FineTuneJob, ranks: Ranks, scratch: Path) -> Surroundings:
    if ranks.is_first:
        console, reporter = Console.from_environment(os.environ), ProgressReporter.from_environment(os.environ)
    else:
        console, reporter = Console(io.StringIO()), ProgressReporter(None)
    return Surroundings(ranks, console, reporter, open_output(job, scratch, ranks), scratch)


def _train(
    job: FineTuneJob, prepared: Prepared, around: Surroundings, device: torch.device, stop_asked: Callable[[], bool]
) -> tuple[StepTrainer, bool]:
    """Train to the end, or to a checkpoint when a stop is asked for (the second value is then true)."""
    spec, plan = job.spec, prepared.plan
    control = RunControl(plan=plan, save_at=steps_to_save(spec, plan), stop_asked=stop_asked, ranks=around.ranks)
    resumed_at = prepared.resume.step if prepared.resume else None
    with MetricsLog(around.output.metrics_path, resumed_at_step=resumed_at) as metrics_log:
        observer = TrainingObserver(reporter=around.reporter, console=around.console, metrics_log=metrics_log)
        trainer = assemble(job, prepared, around, device, [control, observer], observer)
        _announce(prepared, around, trainer.peft_model)
        # Ranks draw different dropout; a resume replaces this by the saved state.
        torch.manual_seed(spec.seed + around.ranks.rank)
        try:
            trainer.train(resume_from_checkpoint=str(prepared.resume_folder) if prepared.resume_folder else None)
        finally:
            around.output.save_metrics()
    return trainer, control.stopped


def assemble(
    job: FineTuneJob,
    prepared: Prepared,
    around: Surroundings,
    device: torch.device,
    callbacks: list[Any],
    observer: BatchingObserver | None = None,
) -> StepTrainer:
    """The model, loaded and with its LoRA layers, in the trainer that is to train it."""
    spec, ranks = job.spec, around.ranks
    model, start = load_adapted(spec, prepared, around, device)
    sharded = is_sharded(spec, model, around.ranks, device)
    own = partial(RankBatches, rank=ranks.rank, world_size=ranks.world_size, in_step=sharded)
    worst_case = spec.padding == "max_length"
    batching = Batching(
        BatchLayout.PADDED if worst_case else BatchLayout.SHARED_PREFIX,
        tokens_per_pack=0,
        rows_per_batch=prepared.rows_per_batch,
        pad_id=prepared.model.pad_id,
        length=(spec.context_length or prepared.row_limit) if worst_case else None,
    )
    evaluation = None
    if prepared.valid is not None:
        rows_per_batch = spec.eval_batch_size_per_device or prepared.rows_per_batch
        evaluation = Evaluation(own(prepared.valid), rows_per_batch)
    arguments = training_arguments(
        spec, prepared.plan, name=job.metadata.name, folder=around.scratch, device=device, sharded=sharded
    )
    return StepTrainer(
        model=model,
        args=arguments,
        steps=StepDataset(own(prepared.train), prepared.plan, batching),
        plan=prepared.plan,
        schedule=prepared.schedule,
        evaluation=evaluation,
        checkpoints=prepared.checkpoints,
        ranks=ranks,
        scratch=around.scratch,
        callbacks=callbacks,
        observer=observer,
        checkpointing=choose_checkpointing(spec.gradient_checkpointing, sharded=sharded),
        sharded=sharded,
        start=start,
        earlier=prepared.resume.manifest.details.get("batching") if prepared.resume else None,
    )


def _announce(prepared: Prepared, around: Surroundings, model: Any) -> None:
    stats, plan = prepared.train.stats, prepared.plan
    processes = f", {around.ranks.world_size} processes" if around.ranks.world_size > 1 else ""
    epochs = f"{plan.epochs} epoch{'s' if plan.epochs > 1 else ''}"
    around.console.phase(
        f"Training {adapted(model).summary(trainable_parameters(model))}. {stats.kept_rows:,} rows, "
        f"{stats.trainable_tokens:,} of their {stats.tokens:,} tokens: {plan.total_steps} steps of "
        f"{plan.rows_per_step} rows, {epochs}{processes}"
    )


def _stopped(trainer: StepTrainer) -> TerminationMessage:
    checkpoint = trainer.last_checkpoint
    return TerminationMessage(
        succeeded=False,
        reason=Reason.TERMINATED,
        message=stopped_sentence(checkpoint_saved=True),
        checkpoint=checkpoint,
    )
