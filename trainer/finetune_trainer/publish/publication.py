"""The end of a run: the best checkpoint's adapter, with all that belongs to it, at the job's output."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from finetune_api.job import FineTuneJob
from finetune_api.outcome import DatasetResult, MetricsResult, Reason, TerminationMessage
from finetune_trainer.data.dataset import DataStats, TokenizedData
from finetune_trainer.data.preview import preview
from finetune_trainer.errors import JobError
from finetune_trainer.inputs import data_source
from finetune_trainer.load_adapted import Trained
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.lora import adapted, trainable_parameters
from finetune_trainer.model.quantized import left_out
from finetune_trainer.pins import base_model_name, fetch_weights, portable
from finetune_trainer.preparation import Prepared, RunContext
from finetune_trainer.publish import proof
from finetune_trainer.publish.adapter import AdapterParts, publish_adapter, published_identity, write_adapter
from finetune_trainer.publish.golden import write_golden
from finetune_trainer.publish.merged import FOLDER as MERGED
from finetune_trainer.publish.merged import publish_merged, release, wants_merged
from finetune_trainer.publish.model_card import read_licence, write_model_card
from finetune_trainer.publish.report import (
    DataCounts,
    RenderedRow,
    ReportData,
    curves_from_metrics,
    library_versions,
    write_report,
)
from finetune_trainer.publish.serving_notes import write_serving_notes
from finetune_trainer.train.checkpoint import Checkpoint
from finetune_trainer.train.checkpoint_files import ADAPTER
from finetune_trainer.verify.golden import GOLDEN

REPORT = "report.html"
SHOWN_ROWS = 3
_SAMPLED_ROWS = 64
"""Rows of the data among which the proof looks for long ones."""


def publish_best(
    job: FineTuneJob, prepared: Prepared, context: RunContext, result: Trained, wall_seconds: float
) -> TerminationMessage:
    """Publish the adapter of the lowest validation loss (without validation the last). Rank 0 only.

    Raises:
        JobError: OutputConflict, the checkpoints were removed meanwhile; AdapterUnproven, training changed nothing or
            the published bytes are not what was trained; or the output cannot be written.
    """
    context.console.phase("Publishing the adapter")
    context.reporter.publish()
    model = result.model
    model.leave_packs()
    # As PEFT computes: sums round in another order where they are fused.
    model.unfuse()
    store, spec = context.output.store, job.spec
    best = prepared.checkpoints.best(context.scratch / "best", context.console.warning)
    if best is None:
        raise JobError(Reason.OUTPUT_CONFLICT, "The run's checkpoints were removed while it ran: start it again.")
    trained = load_file(context.scratch / "best" / ADAPTER)
    moved = proof.movement(result.start, trained, learning_rate=spec.learning_rate)
    for notice in moved.notice():
        context.console.warning(notice)
    folder = context.scratch / "adapter"
    folder.mkdir()
    parts = AdapterParts(
        model=model.peft,
        weights=trained,
        tokenizer=prepared.model.tokenizer,
        generation=prepared.model.generation,
        base=base_model_name(spec, prepared.model.revision),
    )
    write_adapter(folder, parts)
    targets = adapted(model.peft)
    kept_whole = left_out(model.base)
    merges = wants_merged(spec) and not model.sharded
    planned = [f"The merged model goes to {store.uri_of(MERGED)}."] if merges else []
    metrics, dataset = _metrics(best, prepared, context), dataset_result(prepared.train.stats)
    report = replace(
        _report(job, prepared, context, best, metrics, wall_seconds, prepared.notices + moved.notice() + planned),
        targets=targets.summary(trainable_parameters(model.peft)),
        layers=targets.in_full(),
    )
    write_report(folder / REPORT, report)
    store.upload_file(folder / REPORT, REPORT)
    licence = read_licence(model.peft.get_base_model())
    write_model_card(
        folder,
        report,
        base=parts.base,
        licence=licence,
        sha256=prepared.train.stats.sha256,
        quantization=spec.quantization,
    )
    _write_golden(folder, job, prepared, context, model, trained)
    write_serving_notes(
        folder,
        name=job.metadata.name,
        context_length=prepared.model.context_length,
        quantization=spec.quantization,
        left_out=kept_whole,
    )
    run = published_identity(prepared.identity)
    details: dict[str, Any] = {
        "job": job.metadata.name,
        "run": run,
        "baseModel": parts.base.name,
        "baseModelRevision": parts.base.revision,
        **({"quantization": spec.quantization} if spec.quantization else {}),
        **({"quantizationLeftOut": kept_whole} if kept_whole else {}),
        "contextLength": prepared.model.context_length,
        "targets": (report.targets or "")[:512],
        "pins": {key: {**pin, "address": portable(pin["address"])} for key, pin in prepared.pins.contents().items()},
        "metrics": metrics.model_dump(exclude_none=True),
        "dataset": dataset.model_dump(exclude_none=True),
        "step": best.step,
    }
    verify = partial(
        proof.prove,
        model=model.peft,
        trained=trained,
        moved=moved,
        rows=[
            sequence
            for row in range(min(_SAMPLED_ROWS, len(prepared.train)))
            for sequence in prepared.train.sequences(row)
        ],
        sharded=model.sharded,
    )
    adapter = publish_adapter(store, folder, details, verify)
    if adapter.verified is not None:
        context.console.phase(proof.sentence(adapter.verified))
    message = f"The adapter is at {adapter.uri}."
    context.console.phase(message)
    if merges:
        release(model.peft)
        found = publish_merged(
            store,
            folder,
            base_name=parts.base.name,
            weights=fetch_weights(spec, prepared.pins),
            identity=run,
            scratch=context.scratch,
            device=model.device,
            trust_remote_code=spec.trust_remote_code,
            console=context.console,
        )
        message = f"{message} {found}"
    context.reporter.finish()
    return TerminationMessage(
        succeeded=True,
        message=message,
        rank=0,
        adapter=adapter,
        dataset=dataset,
        metrics=metrics,
        checkpoint=prepared.checkpoints.result(best.step),
    )


def dataset_result(stats: DataStats) -> DatasetResult:
    """The counts that travel to status."""
    return DatasetResult(
        rows=stats.rows,
        trainable_tokens=stats.trainable_tokens,
        truncated_rows=stats.truncated_rows,
        dropped_rows=stats.dropped_rows,
        invalid_rows=stats.invalid_rows,
        retokenized_rows=stats.retokenized_rows,
        sha256=stats.sha256,
    )


def _write_golden(
    folder: Path,
    job: FineTuneJob,
    prepared: Prepared,
    context: RunContext,
    model: AdaptedModel,
    trained: dict[str, torch.Tensor],
) -> None:
    """Prompts of the validation data, or of the training data where there is none, with the adapter's answers."""
    spec = job.spec
    if spec.output is not None and not spec.output.golden:
        return
    if model.sharded:
        context.console.warning(f"{GOLDEN} is left out, since the processes share the model.")
        return
    source, rows = prepared.train_source, prepared.train
    if prepared.valid is not None and spec.valid_path:
        source, rows = data_source(spec, prepared.model, spec.valid_path), prepared.valid
    context.console.phase(
        write_golden(
            folder,
            model=model.peft,
            trained=trained,
            tokenizer=prepared.model.tokenizer.tokenizer,
            source=source,
            rows=rows,
        )
    )


def _metrics(best: Checkpoint, prepared: Prepared, context: RunContext) -> MetricsResult:
    evaluated = best.manifest.details.get("metrics") or {}
    return MetricsResult(
        train_loss=context.output.last_epoch_loss(prepared.plan),
        eval_loss=evaluated.get("eval_loss"),
        perplexity=evaluated.get("eval_perplexity"),
        token_accuracy=evaluated.get("eval_token_accuracy"),
    )


def _report(
    job: FineTuneJob,
    prepared: Prepared,
    context: RunContext,
    best: Checkpoint,
    metrics: MetricsResult,
    wall_seconds: float,
    notices: list[str],
) -> ReportData:
    spec, resume = job.spec, prepared.resume
    counts = [_counts("train", spec.train_path, prepared.train)]
    if prepared.valid is not None and spec.valid_path:
        counts.append(_counts("valid", spec.valid_path, prepared.valid))
    rows = [
        RenderedRow(
            title=f"{Path(spec.train_path).name} line {row.row}", spans=row.spans, note="; ".join(row.notes) or None
        )
        for row in preview(prepared.train_source, SHOWN_ROWS)
    ]
    return ReportData(
        job_name=job.metadata.name,
        model=spec.model_id,
        created=datetime.now(UTC),
        job_yaml=yaml.safe_dump(
            _as_trained(job, prepared).model_dump(mode="json", by_alias=True, exclude_none=True),
            sort_keys=False,
            allow_unicode=True,
        ),
        model_revision=prepared.model.revision,
        steps=prepared.plan.total_steps,
        train_loss=metrics.train_loss,
        eval_loss=metrics.eval_loss,
        perplexity=metrics.perplexity,
        token_accuracy=metrics.token_accuracy,
        best_checkpoint_step=best.step,
        wall_seconds=wall_seconds,
        resumed_from=context.output.store.uri_of(resume.checkpoint.key) if resume else None,
        resumed_at_step=resume.checkpoint.step if resume else None,
        curves=curves_from_metrics(context.output.metrics_path),
        token_lengths=prepared.train.row_tokens,
        context_length=prepared.model.context_length,
        data=counts,
        rows=rows,
        versions=library_versions(),
        notices=notices,
    )


def _as_trained(job: FineTuneJob, prepared: Prepared) -> FineTuneJob:
    """The effective job with what the data decided."""
    rows = prepared.rows_per_batch
    found = {
        "train_batch_size_per_device": rows,
        "eval_batch_size_per_device": job.spec.eval_batch_size_per_device or rows,
    }
    return job.model_copy(update={"spec": job.spec.model_copy(update=found)})


def _counts(name: str, source: str, data: TokenizedData) -> DataCounts:
    stats = data.stats
    return DataCounts(
        name=name,
        source=source,
        rows=stats.kept_rows,
        tokens=stats.tokens,
        trainable_tokens=stats.trainable_tokens,
        truncated_rows=stats.truncated_rows,
        dropped_rows=stats.dropped_rows,
        invalid_rows=stats.invalid_rows,
        retokenized_rows=stats.retokenized_rows,
    )
