"""Everything before the first weight: inputs fetched and tokenized, the plan made, the checkpoint found.

What can go wrong with a job goes wrong here, before any model is downloaded or any GPU is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.outcome import Reason, TerminationMessage
from finetune_trainer import inputs
from finetune_trainer.data.dataset import DataSource, TokenizedData, prepare
from finetune_trainer.data.read import file_sha256
from finetune_trainer.data.render import today
from finetune_trainer.digest import digest_of
from finetune_trainer.errors import JobError
from finetune_trainer.job_output import JobOutput
from finetune_trainer.model.sharding import sharding_notice
from finetune_trainer.pins import BASE, Pins, check_node, model_source, resolve
from finetune_trainer.publish.adapter import FOLDER as ADAPTER
from finetune_trainer.publish.adapter import finished_adapter, published_results
from finetune_trainer.publish.merged import has_merged, publish_merged, wants_merged
from finetune_trainer.storage import Manifest, default_cache_dir, fetch_file, fetch_model
from finetune_trainer.storage.content import Content
from finetune_trainer.train.checkpoint import Checkpoint, Checkpoints, recorded_run
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.console import Console
from finetune_trainer.train.plan import TrainingPlan, default_batch_size, make_plan
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.schedule import Schedule, make_schedule
from finetune_trainer.train.tracker_settings import check_tracker


@dataclass(frozen=True)
class RunContext:
    """What every part of a run works with."""

    ranks: Ranks
    console: Console
    """Silent on all ranks but the first."""
    reporter: ProgressReporter
    output: JobOutput
    scratch: Path
    """Empty folder of this process."""


@dataclass(frozen=True)
class Prepared:
    """All that training needs; nothing of it has touched the model's weights."""

    model: inputs.ModelInputs
    train: TokenizedData
    train_source: DataSource
    valid: TokenizedData | None
    plan: TrainingPlan
    schedule: Schedule
    rows_per_batch: int
    """Rows per device and accumulated step: train_batch_size_per_device, or what the data made of its absence."""
    row_limit: int
    """Most tokens that a row has after truncation."""
    identity: dict[str, Any]
    pins: Pins
    checkpoints: Checkpoints
    resume: Resume | None
    notices: list[str]


@dataclass(frozen=True)
class Resume:
    """What a run goes on from."""

    checkpoint: Checkpoint
    folder: Path
    """A copy of it on this node."""


def prepare_run(
    job: FineTuneJob, notices: list[str], context: RunContext, device: torch.device
) -> Prepared | TerminationMessage:
    """Everything up to the weights; or the result, when an earlier attempt has published it.

    Raises:
        JobError: data, model, output or checkpoint are not as the job needs them.
    """
    spec, ranks = job.spec, context.ranks
    told = ranks.on_first(lambda: check_tracker(spec.logger, os.environ))
    told += sharding_notice(spec.sharding, world_size=ranks.world_size)
    train_file = ranks.on_node_first(lambda: fetch_file(spec.train_path))
    train_sha256 = ranks.on_node_first(lambda: file_sha256(train_file))
    _same_everywhere(ranks, f"files at {spec.train_path}", train_sha256)
    identity = inputs.identity(job, train_sha256)
    _same_everywhere(ranks, "jobs", digest_of(identity))
    done = ranks.on_first(lambda: _finished(spec, context, identity, device))
    if done is not None:
        return done
    recorded = ranks.on_first(lambda: recorded_run(context.output.store))
    pins = _pinned(spec, context, recorded)
    model = _in_turn(ranks, lambda: inputs.load_model_inputs(spec, pins))
    _same_everywhere(ranks, f"tokenizers at {model.source.address}", model.tokenizer.fingerprint())
    train_source = inputs.data_source(spec, model, spec.train_path)
    train = _tokenized(context, train_source)
    valid = _tokenized(context, inputs.data_source(spec, model, spec.valid_path)) if spec.valid_path else None
    if valid is not None:
        _same_everywhere(ranks, f"files at {spec.valid_path}", valid.stats.sha256)
    inputs.check_vocabulary(model, max(data.highest_id() for data in (train, valid) if data))
    told += model.warnings + train.stats.notices + (valid.stats.notices if valid else [])
    row_limit = _row_limit(model.context_length, train, valid)
    rows_per_batch = spec.train_batch_size_per_device or _default_batch_size(spec, recorded, train, row_limit)
    plan = make_plan(
        rows=len(train),
        rows_per_step=rows_per_batch * spec.gradient_accumulation_steps * ranks.world_size,
        num_epochs=spec.num_epochs,
        min_update_steps=spec.min_update_steps or 1,
        seed=spec.seed,
    )
    schedule, about_warmup = make_schedule(spec, plan.total_steps)
    told += about_warmup
    for sentence in told:
        context.console.warning(sentence)
    run = identity | pins.run() | {"world_size": ranks.world_size, "rows_per_batch": rows_per_batch}
    checkpoints = Checkpoints(context.output.store, run, spec.num_checkpoints_to_keep)
    return Prepared(
        model=model,
        train=train,
        train_source=train_source,
        valid=valid,
        plan=plan,
        schedule=schedule,
        rows_per_batch=rows_per_batch,
        row_limit=row_limit,
        identity=identity,
        pins=pins,
        checkpoints=checkpoints,
        resume=_resume_from(checkpoints, context),
        notices=notices + told,
    )


def _finished(
    spec: FineTuneJobSpec, context: RunContext, identity: dict[str, Any], device: torch.device
) -> TerminationMessage | None:
    """The result of this very job if it is published already; a merged model that it lacks is made."""
    store = context.output.store
    manifest = finished_adapter(store, identity)
    if manifest is None:
        return None
    result, dataset, metrics = published_results(store, manifest)
    message = f"This job is finished, its adapter is at {result.uri}: nothing was trained."
    context.console.phase(message)
    # Of a model that GPUs shared no attempt makes one.
    if wants_merged(spec) and spec.sharding != "fsdp" and not has_merged(store, manifest.details["run"]):
        message = f"{message} {_merged_afterwards(spec, context, manifest, device)}"
    context.reporter.finish()
    return TerminationMessage(
        succeeded=True,
        message=message,
        adapter=result,
        dataset=dataset,
        metrics=metrics,
    )


def _merged_afterwards(spec: FineTuneJobSpec, context: RunContext, adapter: Manifest, device: torch.device) -> str:
    """Merge the published adapter: the attempt that published it did not come so far."""
    store, source = context.output.store, model_source(spec)
    folder = context.scratch / ADAPTER
    store.download_tree(ADAPTER, folder)
    pinned = Content.from_json(adapter.details.get("pins", {}).get(BASE))
    revision = (pinned.commit if pinned is not None else None) or source.revision
    return publish_merged(
        store,
        folder,
        base_name=str(adapter.details["baseModel"]),
        weights=fetch_model(source.address, revision, trust_remote_code=spec.trust_remote_code).path,
        identity=adapter.details["run"],
        scratch=context.scratch,
        device=device,
        trust_remote_code=spec.trust_remote_code,
        console=context.console,
    )


def _same_everywhere(ranks: Ranks, what: str, digest: str) -> None:
    """Refuse what nodes have different copies of: ranks would train on shares of different plans.

    Args:
        ranks: this process among the others.
        what: goes on "The nodes read different ...".
        digest: of what this node has.

    Raises:
        JobError: DataInvalid.
    """
    if len(set(ranks.gather(digest))) > 1:
        raise JobError(
            Reason.DATA_INVALID,
            f"The nodes read different {what}: give every node the same, or use an s3:// address.",
        )


def _pinned(spec: FineTuneJobSpec, context: RunContext, recorded: dict[str, Any]) -> Pins:
    """What the model and the adapter that is continued are: what a checkpoint was trained on, else what is there."""
    ranks = context.ranks
    pins = ranks.on_first(lambda: resolve(spec, recorded, today=today()))

    def check() -> None:
        if not ranks.is_first:
            check_node(spec, pins)

    ranks.on_node_first(check)
    return pins


def _in_turn(ranks: Ranks, load: Callable[[], inputs.ModelInputs]) -> inputs.ModelInputs:
    """The first rank of each node fetches; the others then find everything in the cache."""
    if ranks.is_node_first:
        loaded = load()
        ranks.barrier()
        return loaded
    ranks.barrier()
    return load()


def _tokenized(context: RunContext, source: DataSource) -> TokenizedData:
    def report(done: int, total: int) -> None:
        context.console.preparing(f"Preparing {source.name}", done, total)
        context.reporter.preparing(done, total)

    def tokenize() -> Path:
        return prepare(source, inputs.tokenized_folder(default_cache_dir()), report).folder

    return TokenizedData(context.ranks.on_node_first(tokenize))


def _default_batch_size(spec: FineTuneJobSpec, recorded: dict[str, Any], train: TokenizedData, row_limit: int) -> int:
    """That of the checkpoint that is gone on with, whichever version chose it; else by the tokens that are computed."""
    known = recorded.get("rows_per_batch")
    if isinstance(known, int):
        return known
    rows = len(train)
    padded = rows * (spec.context_length or row_limit) if spec.padding == "max_length" else None
    return default_batch_size(padded or train.stats.tokens, rows)


def _row_limit(limit: int | None, train: TokenizedData, valid: TokenizedData | None) -> int:
    longest = max(data.stats.longest_row for data in (train, valid) if data)
    return min(limit or longest, longest)


def _resume_from(checkpoints: Checkpoints, context: RunContext) -> Resume | None:
    """The newest whole checkpoint. Only rank 0 may see the output."""
    folder = context.scratch / "resume"
    found = context.ranks.on_first(lambda: checkpoints.newest(folder, context.console.warning))
    if found is None:
        return None
    context.console.phase(f"Resuming from {context.output.store.uri_of(found.key)}")
    return Resume(found, context.ranks.share_folder(folder))
