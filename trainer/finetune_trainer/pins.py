"""Pins the base model, and the adapter that is continued, to what they were when the run began.

A branch of the Hub moves and a prefix is written again while a job waits, loads or retries. Rank 0 resolves each
address once; every node fetches what it found, for tokenizer and weights alike, and checkpoints record it: a later
attempt goes on with the same commit, or is told that its base has changed. So it is with today's date.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from finetune_api.job import FineTuneJobSpec
from finetune_api.outcome import Reason
from finetune_api.training import HubRepository
from finetune_trainer.errors import JobError
from finetune_trainer.storage import FetchedModel, fetch_adapter, fetch_model, fetch_tokenizer
from finetune_trainer.storage.content import Content, content_of

BASE, INITIAL_ADAPTER, BEGAN = "base_model", "initial_adapter", "began"
"""Keys of what a checkpoint records of its run."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

Fetch = Callable[[str, str | None], FetchedModel]


@dataclass(frozen=True)
class ModelSource:
    """Where weights and tokenizer come from."""

    address: str
    """Hub name, folder, or s3:// prefix."""
    revision: str | None


@dataclass(frozen=True)
class Pins:
    """What a run trains on, besides its data."""

    base: Content
    initial_adapter: Content | None
    began: date
    """What chat templates are told that ask for today's date, which would else be another in each attempt."""

    def run(self) -> dict[str, Any]:
        """As checkpoints record it."""
        return self.contents() | {BEGAN: self.began.isoformat()}

    def contents(self) -> dict[str, Any]:
        """What the addresses hold, as `run` has it."""
        found = {BASE: self.base.to_json()}
        return found | ({INITIAL_ADAPTER: self.initial_adapter.to_json()} if self.initial_adapter else {})


@dataclass(frozen=True)
class BaseModelName:
    """What an adapter calls the model that it belongs to, wherever that is served."""

    name: str
    """The Hub's name, else the address as the job has it; of a path its last part."""
    hub_name: str | None
    """The Hub's name, if it has one."""
    revision: str | None
    """Commit on the Hub of the weights that were trained on; None where they came from elsewhere."""


def is_hub_name(address: str) -> bool:
    """Whether `address` is looked up on the Hub: not a path, and no folder that is here."""
    return bool(_HUB_NAME.fullmatch(address)) and not Path(address).expanduser().exists()


def portable(address: str) -> str:
    """`address` as others may read it: of a path its last part, and a digest that tells it from others."""
    if "://" in address or is_hub_name(address):
        return address
    path = Path(address).expanduser()
    return f"{path.name} (a path, sha256 {hashlib.sha256(str(path).encode()).hexdigest()[:16]})"


def base_model_name(spec: FineTuneJobSpec, revision: str | None) -> BaseModelName:
    """The base model's name: that of `model_id`, also where its weights come from somewhere else.

    Args:
        spec: the job's.
        revision: commit that was found for the source of the weights.
    """
    source, weights = ModelSource(spec.model_id, spec.model_revision), model_source(spec)
    if not is_hub_name(source.address) and is_hub_name(weights.address):
        source = weights
    if is_hub_name(source.address):
        return BaseModelName(source.address, source.address, revision if source.address == weights.address else None)
    name = source.address if "://" in source.address else Path(source.address).expanduser().resolve().name
    return BaseModelName(name, None, None)


def weights_source(value: str | HubRepository | None) -> ModelSource | None:
    """The source that an initial_*_ckpt_path names."""
    if isinstance(value, HubRepository):
        return ModelSource(value.repo_id, value.revision)
    return ModelSource(value, None) if value is not None else None


def model_source(spec: FineTuneJobSpec) -> ModelSource:
    """initial_base_model_ckpt_path where it is given, else the model id."""
    return weights_source(spec.initial_base_model_ckpt_path) or ModelSource(spec.model_id, spec.model_revision)


def resolve(spec: FineTuneJobSpec, recorded: Mapping[str, Any], *, today: date) -> Pins:
    """What the job's addresses stand for; rank 0 only.

    Args:
        spec: the job's.
        recorded: what the checkpoint says of its run that is gone on with; empty where there is none.
        today: the date of a run that begins now.

    Raises:
        JobError: CheckpointMismatch, an address holds something else than the checkpoint was trained on; or as
            fetching does.
    """
    initial = weights_source(spec.initial_adapter_model_ckpt_path)
    return Pins(
        _resolve(model_source(spec), _tokenizer(spec), Content.from_json(recorded.get(BASE))),
        _resolve(initial, fetch_adapter, Content.from_json(recorded.get(INITIAL_ADAPTER))) if initial else None,
        date.fromisoformat(recorded[BEGAN]) if BEGAN in recorded else today,
    )


def check_node(spec: FineTuneJobSpec, pins: Pins) -> None:
    """Check that this node finds what rank 0 found.

    Raises:
        JobError: CheckpointMismatch, it does not; or as fetching does.
    """
    _same(pins.base, _tokenizer(spec))
    if pins.initial_adapter is not None:
        _same(pins.initial_adapter, fetch_adapter)


def fetch_weights(spec: FineTuneJobSpec, pins: Pins) -> Path:
    """The base model's folder on this node, with the weights of what was pinned.

    Raises:
        JobError: CheckpointMismatch, they were written again since the run began; or as fetching does.
    """

    def fetch(address: str, revision: str | None) -> FetchedModel:
        return fetch_model(address, revision, trust_remote_code=spec.trust_remote_code)

    # Folders are not fetched, and what they hold was compared a moment ago.
    return fetch(pins.base.address, None).path if pins.base.kind == "files" else _same(pins.base, fetch).path


def fetch_initial_adapter(pin: Content) -> Path:
    """The pinned adapter's folder on this node. Raises as fetch_weights does."""
    return _same(pin, fetch_adapter).path


def _tokenizer(spec: FineTuneJobSpec) -> Fetch:
    return lambda address, revision: fetch_tokenizer(address, revision, code=spec.trust_remote_code)


def _resolve(source: ModelSource, fetch: Fetch, recorded: Content | None) -> Content:
    if recorded is None or recorded.address != source.address:
        # The spec decides on the address, and its change is refused with the checkpoint.
        return content_of(source.address, fetch(source.address, source.revision))
    try:
        found = content_of(source.address, fetch(source.address, recorded.commit or source.revision))
    except JobError as error:
        if recorded.commit is None or error.reason is not Reason.MODEL_NOT_FOUND:
            raise
        found = content_of(source.address, fetch(source.address, source.revision))
    if found != recorded:
        raise JobError(
            Reason.CHECKPOINT_MISMATCH,
            f"The checkpoint was trained on {recorded}, and there is now {found}: bring the former back, choose "
            "another output, or remove the checkpoints there.",
        )
    return found


def _same(pin: Content, fetch: Fetch) -> FetchedModel:
    fetched = fetch(pin.address, pin.commit)
    found = content_of(pin.address, fetched)
    if found != pin:
        raise JobError(
            Reason.CHECKPOINT_MISMATCH,
            f"This run began on {pin}, and here or by now there is {found}: give every node the same files, do not "
            "write them again while the job runs, and start it anew.",
        )
    return fetched
