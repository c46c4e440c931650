"""`output.merged`: the whole model beside the published adapter, merged from the very bytes that were published.

The adapter is the job's result and is there before. What only the user can mend (an adapter that no folder can hold
merged, a full disk) is said and costs the job nothing; what another try may mend ends the attempt, and the next one
finds the adapter and merges it.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune_api.job import FineTuneJobSpec
from finetune_api.outcome import FIRST_RETRYABLE_EXIT_CODE
from finetune_trainer.errors import JobError
from finetune_trainer.merge.merge import Merged, merge
from finetune_trainer.publish.adapter import FOLDER as ADAPTER
from finetune_trainer.storage import ObjectStore, read_manifest
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.train.console import Console

FOLDER = "merged"


def wants_merged(spec: FineTuneJobSpec) -> bool:
    """Whether the job asks for the whole model too."""
    return spec.output is not None and spec.output.merged


def sharded_notice(spec: FineTuneJobSpec, *, sharded: bool) -> list[str]:
    """Why `output.merged` has no effect, if it has none."""
    if not sharded or not wants_merged(spec):
        return []
    return ["output.merged has no effect where GPUs share the model: run `finetune merge` on the adapter afterwards."]


def has_merged(store: ObjectStore, identity: Mapping[str, Any]) -> bool:
    """Whether the output holds the merged model of this very job, whole."""
    manifest = read_manifest(store, FOLDER)
    return manifest is not None and manifest.details.get("run") == identity


def publish_merged(
    store: ObjectStore,
    adapter: Path,
    *,
    base_name: str,
    weights: Path,
    identity: Mapping[str, Any],
    scratch: Path,
    device: torch.device,
    trust_remote_code: bool,
    console: Console,
) -> str:
    """Merge the adapter in the folder `adapter` and publish the result as `merged`.

    Args:
        store: the job's output.
        adapter: what was published.
        base_name: what the base model is called.
        weights: its folder.
        identity: of the job, as in the adapter's manifest.
        scratch: folder of this process.
        device: what the job trained on.
        trust_remote_code: the job's.
        console: is told of it.

    Returns:
        Where it is, or why there is none, as a sentence.

    Raises:
        JobError: another try may succeed.
    """
    console.phase("Merging the adapter into its base model")
    target = store.folder / FOLDER if isinstance(store, LocalStore) else scratch / FOLDER
    try:
        store.delete_tree(FOLDER)
        merged = merge(
            str(adapter),
            target,
            base_model=base_name,
            weights=weights,
            details={"run": dict(identity)},
            device=device,
            trust_remote_code=trust_remote_code,
        )
        if not isinstance(store, LocalStore):
            store.upload_tree(target, FOLDER)
    except (MemoryError, torch.OutOfMemoryError):
        return _missing(
            f"the memory here does not hold it. Run `finetune merge {store.uri_of(ADAPTER)}` elsewhere.", console
        )
    except JobError as error:
        if error.exit_code >= FIRST_RETRYABLE_EXIT_CODE:
            raise
        return _missing(error.message, console)
    for notice in merged.notices:
        console.warning(notice)
    return _announced(merged, store.uri_of(FOLDER), console)


def _missing(why: str, console: Console) -> str:
    sentence = f"There is no merged model: {why}"
    console.warning(sentence)
    return sentence


def _announced(merged: Merged, uri: str, console: Console) -> str:
    sentence = f"The merged model is at {uri}."
    console.phase(f"{sentence} {merged.dtype}. {merged.sentence()}")
    return sentence


def release(model: Any) -> None:
    """Take a model's weights away: training is over, and the merge needs the room."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
