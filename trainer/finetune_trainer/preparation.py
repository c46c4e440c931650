"""Everything before the first weight: inputs fetched and tokenized, the plan made, the checkpoint found.

What can go wrong with a job goes wrong here, before any model is downloaded or any GPU is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.defaults import default_batch_size
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.outcome import DatasetResult, Reason, TerminationMessage
from finetune_trainer import inputs
from finetune_trainer.data.dataset import DataSource, TokenizedData, prepare
from finetune_trainer.data.read import file_sha256
from finetune_trainer.errors import JobError
from finetune_trainer.job_output import JobOutput
from finetune_trainer.pins import BASE, Pins, check_node, model_source, resolve
from finetune_trainer.publish.adapter import FOLDER as ADAPTER
from finetune_trainer.publish.adapter import adapter_result, finished_adapter, metrics_of
from finetune_trainer.publish.merged import has_merged, publish_merged, wants_merged
from finetune_trainer.storage import Manifest, default_cache_dir, fetch_file, fetch_model
from finetune_trainer.storage.content import Content
from finetune_trainer.train.arguments import set_up_tracker, sharding_notice
from finetune_trainer.train.checkpoint import Checkpoint, Checkpoints, recorded_run
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.console import Console
from finetune_trainer.train.plan import TrainingPlan, make_plan
from finetune_trainer.train.progress import ProgressReporter
from finetune_trainer.train.schedule import Schedule, make_schedule


@dataclass(frozen=True)
class Surroundings:
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
    row_limit: int
    """Most tokens that a row has after truncation."""
    identity: dict[str, Any]
    pins: Pins
    checkpoints: Checkpoints
    resume: Checkpoint | None
    resume_folder: Path | None
    notices: list[str]


def prepare_run(
    job: FineTuneJob, notices: list[str], around: Surroundings, device: torch.device
) -> Prepared | TerminationMessage:
    """Everything up to the weights; or the result, when an earlier attempt has published it.

    Raises:
        JobError: data, model, output or checkpoint are not as the job needs them.
    """
    spec, ranks = job.spec, around.ranks
    told = set_up_tracker(spec.logger) + sharding_notice(spec.sharding, device=device, world_size=ranks.world_size)
    train_file = ranks.on_node_first(lambda: fetch_file(spec.train_path))
    train_sha256 = ranks.on_node_first(lambda: file_sha256(train_file))
    _same_everywhere(ranks, train_sha256, spec.train_path)
    identity = inputs.identity(job, train_sha256)
    done = ranks.on_first(lambda: _finished(spec, around, identity, device))
    if done is not None:
        return done
    pins = _pinned(spec, around)
    model = _in_turn(ranks, lambda: inputs.load_model_inputs(spec, pins))
    train_source = inputs.data_source(spec, model, spec.train_path)
    train = _tokenized(around, train_source)
    valid = _tokenized(around, inputs.data_source(spec, model, spec.valid_path)) if spec.valid_path else None
    if valid is not None:
        _same_everywhere(ranks, valid.stats.sha256, str(spec.valid_path))
    inputs.check_vocabulary(model, max(data.highest_id() for data in (train, valid) if data))
    told += model.warnings + train.stats.notices + (valid.stats.notices if valid else [])
    row_limit = _row_limit(model.context_length, train, valid)
    rows_per_batch = spec.train_batch_size_per_device or default_batch_size(row_limit)
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
        around.console.warning(sentence)
    run = identity | pins.run() | {"world_size": ranks.world_size, "rows_per_batch": rows_per_batch}
    checkpoints = Checkpoints(around.output.store, run, spec.num_checkpoints_to_keep)
    resume, resume_folder = _resume_from(checkpoints, around)
    return Prepared(
        model,
        train,
        train_source,
        valid,
        plan,
        schedule,
        rows_per_batch,
        row_limit,
        identity,
        pins,
        checkpoints,
        resume,
        resume_folder,
        notices + told,
    )


def _finished(
    spec: FineTuneJobSpec, around: Surroundings, identity: dict[str, Any], device: torch.device
) -> TerminationMessage | None:
    """The result of this very job if it is published already; a merged model that it lacks is made."""
    store = around.output.store
    manifest = finished_adapter(store, identity)
    if manifest is None:
        return None
    result = adapter_result(store, manifest)
    message = f"This job is finished, its adapter is at {result.uri}: nothing was trained."
    around.console.phase(message)
    # Of a model that GPUs shared no attempt makes one.
    if wants_merged(spec) and spec.sharding != "fsdp" and not has_merged(store, manifest.details["run"]):
        message = f"{message} {_merged_afterwards(spec, around, manifest, device)}"
    around.reporter.finish()
    return TerminationMessage(
        succeeded=True,
        message=message,
        adapter=result,
        dataset=DatasetResult.model_validate(manifest.details["dataset"]),
        metrics=metrics_of(manifest),
    )


def _merged_afterwards(spec: FineTuneJobSpec, around: Surroundings, adapter: Manifest, device: torch.device) -> str:
    """Merge the published adapter: the attempt that published it did not come so far."""
    store, source = around.output.store, model_source(spec)
    folder = around.scratch / ADAPTER
    store.download_tree(ADAPTER, folder)
    pinned = Content.from_json(adapter.details.get("pins", {}).get(BASE))
    revision = (pinned.commit if pinned is not None else None) or source.revision
    return publish_merged(
        store,
        folder,
        base_name=str(adapter.details["baseModel"]),
        weights=fetch_model(source.address, revision, trust_remote_code=spec.trust_remote_code).path,
        identity=adapter.details["run"],
        scratch=around.scratch,
        device=device,
        trust_remote_code=spec.trust_remote_code,
        console=around.console,
    )


def _same_everywhere(ranks: Ranks, digest: str, path: str) -> None:
    """Refuse data that nodes have different copies of: ranks would train on shares of different plans."""
    if len(set(ranks.gather(digest))) > 1:
        raise JobError(
            Reason.DATA_INVALID,
            f"The nodes read different files at {path}: give every node the same, or use an s3:// address.",
        )


def _pinned(spec: FineTuneJobSpec, around: Surroundings) -> Pins:
    """What the model and the adapter that is continued are: what a checkpoint was trained on, else what is there."""
    ranks = around.ranks
    pins = ranks.on_first(lambda: resolve(spec, recorded_run(around.output.store)))

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


def _tokenized(around: Surroundings, source: DataSource) -> TokenizedData:
    def report(done: int, total: int) -> None:
        around.console.preparing(f"Preparing {source.name}", done, total)
        around.reporter.preparing(done, total)

    def tokenize() -> Path:
        return prepare(source, inputs.tokenized_folder(default_cache_dir()), report).folder

    return TokenizedData(around.ranks.on_node_first(tokenize))


def _row_limit(limit: int | None, train: TokenizedData, valid: TokenizedData | None) -> int:
    longest = max(data.stats.longest_row for data in (train, valid) if data)
    return min(limit or longest, longest)


def _resume_from(checkpoints: Checkpoints, around: Surroundings) -> tuple[Checkpoint | None, Path | None]:
    """The newest whole checkpoint and a copy of it on this node. Only rank 0 may see the output."""
    folder = around.scratch / "resume"
    found = around.ranks.on_first(lambda: checkpoints.newest(folder, around.console.warning))
    if found is None:
        return None, None
    around.console.phase(f"Resuming from {around.output.store.uri_of(found.key)}")
    return found, around.ranks.share_folder(folder)
