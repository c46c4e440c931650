"""The parts of the training loop, put together for one job."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from finetune_api.job import FineTuneJobSpec
from finetune_api.outcome import BatchLayout
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import TokenPair
from finetune_trainer.preparation import Prepared, RunContext
from finetune_trainer.storage import default_cache_dir
from finetune_trainer.train import state as saved
from finetune_trainer.train.batching import Batching, RankBatches
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
from finetune_trainer.train.choice import choose
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.evaluation import Evaluation
from finetune_trainer.train.gradients import Gradients
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.observer import TrainingObserver
from finetune_trainer.train.remembered import Remembered, name_of
from finetune_trainer.train.saver import Saver
from finetune_trainer.train.schedule import steps_to_save
from finetune_trainer.train.steps import StepRunner, first_rows

_GATE_ROWS = 64
"""Rows among which the gate looks for its sample, at least; all of a step show whether they fill several packs."""


def make_loop(
    spec: FineTuneJobSpec,
    prepared: Prepared,
    context: RunContext,
    model: AdaptedModel,
    *,
    observer: TrainingObserver,
    writer: CheckpointWriter | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Loop:
    """The loop of a job, where the checkpoint that it resumes from left it.

    How rows become batches is decided here: the gate runs some of them.

    Args:
        spec: the effective job's.
        prepared: what was made of it.
        context: of this process.
        model: with the adapter that is to be trained.
        observer: is told what happens.
        writer: takes checkpoints, on rank 0.
        stop_asked: whether this process was asked to stop.

    Raises:
        JobError: ModelUnsupported, the model is not causal.
    """
    ranks, plan, resume = context.ranks, prepared.plan, prepared.resume
    rows_of = partial(RankBatches, rank=ranks.rank, world_size=ranks.world_size, in_step=model.sharded)
    worst_case = spec.padding == "max_length"
    batching = Batching(
        BatchLayout.PADDED if worst_case else BatchLayout.SHARED_PREFIX,
        tokens_per_pack=0,
        rows_per_batch=prepared.rows_per_batch,
        pad_id=prepared.model.pad_id,
        length=(spec.context_length or prepared.row_limit) if worst_case else None,
    )
    sample = first_rows(prepared.train, plan, max(_GATE_ROWS, plan.rows_per_step))
    choice = choose(
        model,
        ranks,
        sample,
        batching,
        checkpointing=spec.gradient_checkpointing,
        longest=int(prepared.train.row_tokens.max()),
        earlier=resume.checkpoint.manifest.details.get("batching") if resume else None,
        bound=ranks.on_first(context.output.pack_bound),
        remembered=_remembered(spec, prepared, model, batching, sample, ranks) if resume is None else None,
    )
    observer.batching_chosen(choice, resume.checkpoint.step if resume else 0)
    gradients = Gradients(model.trained)
    # All that is trained are matrices, so there is nothing to keep from decay.
    optimizer = torch.optim.AdamW(model.trained, lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
    runner = StepRunner(
        model, rows_of(prepared.train), plan, choice, gradients, ranks, observer, context.output.bound_packs
    )
    evaluation = None
    if prepared.valid is not None:
        rows = rows_of(prepared.valid)
        evaluation = Evaluation(model, rows, spec.eval_batch_size_per_device, ranks, observer.batches_halved)
    # Ranks draw different dropout.
    torch.manual_seed(spec.seed + ranks.rank)
    if resume:
        saved.load_optimizer_state(model.peft, optimizer, resume.folder)
        saved.load_random_state(resume.folder, ranks)
    return Loop(
        model=model,
        plan=plan,
        schedule=prepared.schedule,
        runner=runner,
        gradients=gradients,
        optimizer=optimizer,
        evaluation=evaluation,
        saver=Saver(model, optimizer, runner, plan, writer, ranks, context.scratch),
        observer=observer,
        learning_rate=spec.learning_rate,
        max_grad_norm=spec.max_grad_norm,
        save_at=steps_to_save(spec, plan),
        stop_asked=stop_asked,
    )


def _remembered(
    spec: FineTuneJobSpec,
    prepared: Prepared,
    model: AdaptedModel,
    batching: Batching,
    sample: list[list[TokenPair]],
    ranks: Ranks,
) -> Remembered:
    """What the gate may have found of this job's case before."""
    case = {
        "contents": prepared.pins.contents(),
        "lora": spec.lora_config.model_dump(mode="json"),
        "seed": spec.seed,
        "trust_remote_code": spec.trust_remote_code,
        "quantization": spec.quantization,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "dtype": model.dtype,
        "sharded": model.sharded,
        "batching": batching,
    }
    return Remembered(default_cache_dir() / "measured", case, sample, ranks.gather(name_of(model.device)))
