"""A job from its first fetch to its published adapter, in the order a reader would expect."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from finetune_api.job import FineTuneJob
from finetune_api.outcome import Reason, TerminationMessage
from finetune_trainer.assemble import make_loop
from finetune_trainer.errors import JobError
from finetune_trainer.job_output import open_output
from finetune_trainer.launch.failures import stopped_sentence
from finetune_trainer.load_adapted import Trained, load_adapted
from finetune_trainer.model.lora import adapted, trainable_parameters
from finetune_trainer.preparation import Prepared, RunContext, prepare_run
from finetune_trainer.publish.publication import publish_best
from finetune_trainer.signals import StopFlag, stop_at_once
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.console import Console
from finetune_trainer.train.loop import train
from finetune_trainer.train.metrics_log import MetricsLog
from finetune_trainer.train.observer import TrainingObserver
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.trackers import Trackers, open_trackers, run_key

TRACKERS = "trackers"
"""Scratch folder where experiment trackers write."""
_LAST_UPLOAD_SECONDS = 900.0
"""How long the last checkpoint may take after training. The adapter is published from it."""
_STOPPED_UPLOAD_SECONDS = 15.0
"""The same of a run that was stopped: pods have 30 s from the signal to their end."""


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
        context = _run_context(job, ranks, Path(scratch))
        try:
            # Until training starts nothing would be lost, so a stop ends the run at once.
            with stop_at_once():
                context.reporter.start()
                prepared = prepare_run(job, notices, context, device)
                if isinstance(prepared, TerminationMessage):
                    return prepared
                trained = load_adapted(job.spec, prepared, context, device)
                _announce(prepared, context, trained)
            # From here on a stop waits for the step under way and a checkpoint.
            with StopFlag() as stop:
                stopped = _train(job, prepared, context, trained, stop.is_set)
                if stopped is not None:
                    return stopped
                return ranks.on_first(lambda: publish_best(job, prepared, context, trained, time.monotonic() - started))
        finally:
            context.reporter.close()
            context.output.close()


def _run_context(job: FineTuneJob, ranks: Ranks, scratch: Path) -> RunContext:
    if ranks.is_first:
        console, reporter = Console.from_environment(os.environ), ProgressReporter.from_environment(os.environ)
    else:
        console, reporter = Console(io.StringIO()), ProgressReporter(None)
    return RunContext(ranks, console, reporter, open_output(job, scratch, ranks, say=console.phase), scratch)


def _train(
    job: FineTuneJob, prepared: Prepared, context: RunContext, trained: Trained, stop_asked: Callable[[], bool]
) -> TerminationMessage | None:
    """Train to the end, or to a checkpoint when a stop is asked for: then this rank's last words."""
    resumed_at = prepared.resume.checkpoint.step if prepared.resume else None
    with ExitStack() as stack:
        writer = metrics_log = None
        if context.ranks.is_first:
            # Whatever ends the run, its figures are kept.
            stack.callback(context.output.save_metrics)
            metrics_log = stack.enter_context(MetricsLog(context.output.metrics_path, resumed_at_step=resumed_at))
            writer = stack.enter_context(CheckpointWriter(prepared.checkpoints, context.console.warning))
        trackers = _trackers(job, prepared, context)
        stack.callback(_keep_files, trackers, context)
        # After a success it is closed already.
        stack.callback(lambda: trackers.finish(succeeded=False))
        observer = TrainingObserver(
            reporter=context.reporter,
            console=context.console,
            metrics_log=metrics_log,
            total_steps=prepared.plan.total_steps,
            track=trackers.log,
        )

        def stop() -> bool:
            """Asked before each step; what makes it vain to train on is raised."""
            context.output.check()
            if writer is not None:
                writer.check()
            return stop_asked()

        loop = make_loop(job.spec, prepared, context, trained.model, observer=observer, writer=writer, stop_asked=stop)
        stopped = train(loop, start=resumed_at or 0, eval_first=job.spec.eval_first)
        if not stopped:
            trackers.finish()
            if writer is not None:
                writer.flush(_LAST_UPLOAD_SECONDS)
            return None
        return _stopped(writer, context)


def _trackers(job: FineTuneJob, prepared: Prepared, context: RunContext) -> Trackers:
    """The run at the job's experiment tracker, the same one for all attempts; rank 0's alone."""
    if not context.ranks.is_first:
        return Trackers()
    return open_trackers(
        job.spec.logger,
        run_name=job.metadata.name,
        run_key=run_key(context.output.store.uri, prepared.identity | prepared.pins.run()),
        folder=context.scratch / TRACKERS,
        config=prepared.identity | {"total_steps": prepared.plan.total_steps},
        console=context.console,
        resumed_at_step=prepared.resume.checkpoint.step if prepared.resume else None,
    )


def _keep_files(trackers: Trackers, context: RunContext) -> None:
    """Bring the tracker's files to the output; no run fails for want of them."""
    try:
        context.output.save_files(trackers.files(), context.scratch / TRACKERS)
    except JobError as error:
        context.console.warning(f"The experiment tracker's files are not at the output: {error.message}")


def _announce(prepared: Prepared, context: RunContext, trained: Trained) -> None:
    stats, plan, model = prepared.train.stats, prepared.plan, trained.model.peft
    processes = f", {context.ranks.world_size} processes" if context.ranks.world_size > 1 else ""
    epochs = f"{plan.epochs} epoch{'s' if plan.epochs > 1 else ''}"
    context.console.phase(
        f"Training {adapted(model).summary(trainable_parameters(model))}. {stats.kept_rows:,} rows, "
        f"{stats.trainable_tokens:,} of their {stats.tokens:,} tokens: {plan.total_steps} steps of "
        f"{plan.rows_per_step} rows, {epochs}{processes}"
    )


def _stopped(writer: CheckpointWriter | None, context: RunContext) -> TerminationMessage:
    """Last words; the checkpoint that was just made is brought away if that is quick."""
    saved = True
    if writer is not None:
        try:
            writer.flush(_STOPPED_UPLOAD_SECONDS)
        except JobError as error:
            saved = False
            context.console.warning(f"The last checkpoint could not be saved: {error.message}")
    return TerminationMessage(
        succeeded=False,
        reason=Reason.TERMINATED,
        message=stopped_sentence(checkpoint_saved=saved),
        checkpoint=writer.last if writer is not None else None,
    )
