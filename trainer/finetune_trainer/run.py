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

from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.outcome import BatchLayout, Reason, TerminationMessage
from finetune_trainer.job_output import open_output
from finetune_trainer.launch.failures import stopped_sentence
from finetune_trainer.model.load import load_model, training_dtype
from finetune_trainer.model.lora import add_lora, continue_lora, kept_settings, trainable_parameters
from finetune_trainer.pins import fetch_initial_adapter, fetch_weights
from finetune_trainer.preparation import Prepared, Surroundings, prepare_run
from finetune_trainer.publish.publication import publish_best
from finetune_trainer.signals import StopFlag, stop_at_once
from finetune_trainer.train import state as saved
from finetune_trainer.train.arguments import choose_checkpointing, choose_sharding, training_arguments
from finetune_trainer.train.batching import Batching, RankBatches, StepDataset
from finetune_trainer.train.callbacks import TrainingObserver
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.console import Console
from finetune_trainer.train.metrics_log import MetricsLog
from finetune_trainer.train.plan import TrainingPlan, save_steps
from finetune_trainer.train.progress import ProgressReporter
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
    control = RunControl(plan=plan, save_at=_save_steps(spec, plan), stop_asked=stop_asked, ranks=around.ranks)
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


def _load_model(spec: FineTuneJobSpec, prepared: Prepared, around: Surroundings, device: torch.device) -> Any:
    pins, ranks = prepared.pins, around.ranks
    around.console.phase(f"Loading {pins.base.address}")
    folder = ranks.on_node_first(lambda: fetch_weights(spec, pins))
    told: list[str] = []
    trusted, name = spec.trust_remote_code, pins.base.address
    base = load_model(folder, dtype=training_dtype(device), trust_remote_code=trusted, name=name, notices=told)
    for sentence in told:
        around.console.warning(sentence)
    prepared.notices.extend(told)
    torch.manual_seed(spec.seed)
    initial = pins.initial_adapter
    if initial is None:
        model = add_lora(base, spec.lora_config)
    else:
        model = continue_lora(base, ranks.on_node_first(lambda: fetch_initial_adapter(initial)))
        for sentence in kept_settings(model, spec.lora_config):
            around.console.warning(sentence)
    if prepared.resume_folder is not None:
        saved.load_adapter_state(model, prepared.resume_folder)
    return model


def _save_steps(spec: FineTuneJobSpec, plan: TrainingPlan) -> frozenset[int]:
    frequency = spec.checkpoint_and_evaluation_frequency
    every = frequency.value * (plan.steps_per_epoch if frequency.strategy == "epochs" else 1)
    return save_steps(total_steps=plan.total_steps, every=every, at_most=spec.max_num_checkpoints)


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
    model = _load_model(spec, prepared, around, device)
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    sharded = choose_sharding(spec.sharding, device=device, world_size=ranks.world_size, base_bytes=base_bytes)
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
        evaluation=evaluation,
        checkpoints=prepared.checkpoints,
        ranks=ranks,
        scratch=around.scratch,
        callbacks=callbacks,
        observer=observer,
        checkpointing=choose_checkpointing(spec.gradient_checkpointing, sharded=sharded),
        sharded=sharded,
        earlier=prepared.resume.manifest.details.get("batching") if prepared.resume else None,
    )


def _announce(prepared: Prepared, around: Surroundings, model: Any) -> None:
    stats, plan = prepared.train.stats, prepared.plan
    processes = f", {around.ranks.world_size} processes" if around.ranks.world_size > 1 else ""
    epochs = f"{plan.epochs} epoch{'s' if plan.epochs > 1 else ''}"
    around.console.phase(
        f"Training {trainable_parameters(model):,} LoRA parameters on {stats.kept_rows:,} rows, "
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
