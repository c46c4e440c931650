"""Checkpoints in the job's output: complete or absent, and never taken up by a job they do not belong to.

Each is a folder `checkpoints/step-00000010` whose manifest is written last. The manifest tells which run it belongs
to; the files are the adapter, optimizer, schedule, trainer state and every rank's random state.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.outcome import CheckpointResult, Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage import MANIFEST_NAME, Manifest, ObjectStore, read_manifest, write_manifest
from finetune_trainer.storage.errors import local_errors
from finetune_trainer.train.checkpoint_files import ADAPTER, adapter_fault, resume_fault

FOLDER = "checkpoints"
_STEP = re.compile(r"step-\d{8}")
_NAME = re.compile(rf"^{FOLDER}/(step-(\d{{8}}))/{re.escape(MANIFEST_NAME)}$")

_LARGEST_LOSS = 1e300
"""No comparison with a value that is no number says which is the better."""

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    key: str
    """Folder in the job's output."""
    step: int
    """Optimizer steps it has."""
    manifest: Manifest

    @property
    def eval_loss(self) -> float | None:
        """Validation loss when it was made, or None without validation data."""
        value = self.manifest.details.get("evalLoss")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_LOSS:
            return None
        return float(value)


class Checkpoints:
    """The checkpoints of one job in its output.

    Args:
        store: the job's output.
        identity: what decides the course of training, by name; a checkpoint of another is refused.
        keep: number of best checkpoints kept besides the newest.
    """

    def __init__(self, store: ObjectStore, identity: Mapping[str, Any], keep: int) -> None:
        self._store = store
        self._identity = dict(identity)
        self._keep = keep

    def all(self, warn: Warn = lambda _: None) -> list[Checkpoint]:
        """Complete checkpoints, oldest first. Folders without a manifest that can be read do not count.

        `warn` is told of those with one that cannot.
        """
        return self._complete(self._store.list(FOLDER), warn)

    def _complete(self, keys: Iterable[str], warn: Warn) -> list[Checkpoint]:
        found = []
        for key in keys:
            match = _NAME.match(key)
            manifest = self._manifest(f"{FOLDER}/{match.group(1)}", warn) if match else None
            if match and manifest is not None:
                found.append(Checkpoint(f"{FOLDER}/{match.group(1)}", int(match.group(2)), manifest))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest(self, folder: Path, warn: Warn) -> Checkpoint | None:
        """The newest checkpoint that is whole, with a copy of it in `folder`; None when there is none.

        Args:
            folder: does not exist yet.
            warn: is told of damaged ones, which are left out from then on.

        Raises:
            JobError: CheckpointMismatch, one belongs to another job, other data or another number of processes.
        """
        return self._first_whole(reversed(self.all(warn)), folder, warn, adapter_only=False)

    def best(self, folder: Path, warn: Warn) -> Checkpoint | None:
        """The whole checkpoint of the lowest validation loss, the earlier one of two equal; without validation the
        newest. A copy of its adapter is put in `folder`; otherwise as `newest`."""
        return self._first_whole(sorted(self.all(warn), key=_rank), folder, warn, adapter_only=True)

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that another run made.

        Raises:
            JobError: CheckpointMismatch, with what differs.
        """
        found = checkpoint.manifest.details.get("run")
        found = found if isinstance(found, dict) else {}
        names = [name for name in {**found, **self._identity} if found.get(name) != self._identity.get(name)]
        if names:
            shown = ", ".join(
                f"{name} was {found.get(name)!r} and is now {self._identity.get(name)!r}" for name in names
            )
            raise JobError(
                Reason.CHECKPOINT_MISMATCH,
                f"{self._store.uri_of(checkpoint.key)} belongs to another run ({shown[:1500]}): choose another output, "
                "or remove the checkpoints there.",
            )

    def seal(self, folder: Path, *, step: int, eval_loss: float | None, details: Mapping[str, Any]) -> Manifest:
        """Put the manifest of the checkpoint of `step` into `folder`, whose files are then final."""
        with local_errors(folder):
            return write_manifest(folder, {**details, "step": step, "evalLoss": eval_loss, "run": self._identity})

    def upload(self, folder: Path, step: int) -> CheckpointResult:
        """Publish a sealed `folder` as the checkpoint of `step`."""
        result = self.result(step)
        self._store.upload_tree(folder, f"{FOLDER}/step-{step:08d}")
        return result

    def prune(self) -> None:
        """Remove all but the newest checkpoint and the best ones, and what killed attempts left of older ones."""
        keys = self._store.list(FOLDER)
        checkpoints = self._complete(keys, lambda _: None)
        kept = {checkpoint.step for checkpoint in sorted(checkpoints, key=_rank)[: self._keep]}
        for checkpoint in checkpoints[:-1]:
            if checkpoint.step not in kept:
                self._store.delete_tree(checkpoint.key)
        if checkpoints:
            self._remove_unfinished(keys, before=checkpoints[-1].key)

    def _remove_unfinished(self, keys: Iterable[str], *, before: str) -> None:
        finished = {match.group(1) for key in keys if (match := _NAME.match(key))}
        for name in sorted({key.split("/")[1] for key in keys} - finished):
            if _STEP.fullmatch(name) and f"{FOLDER}/{name}" < before:
                self._store.delete_tree(f"{FOLDER}/{name}")

    def result(self, step: int) -> CheckpointResult:
        """Address of the checkpoint of `step`."""
        return CheckpointResult(uri=self._store.uri_of(f"{FOLDER}/step-{step:08d}"), step=step)

    def _manifest(self, key: str, warn: Warn) -> Manifest | None:
        try:
            return read_manifest(self._store, key)
        except JobError as error:
            if error.reason is not Reason.STORAGE_NOT_FOUND:
                raise
            # A newer version may have written it, so that it stays.
            warn(f"The checkpoint {self._store.uri_of(key)} is not used: {error.message}")
            return None

    def _first_whole(
        self, checkpoints: Iterable[Checkpoint], folder: Path, warn: Warn, *, adapter_only: bool
    ) -> Checkpoint | None:
        for checkpoint in checkpoints:
            self.check(checkpoint)
            damage = self._fetch(checkpoint, folder, adapter_only=adapter_only)
            if damage is None:
                return checkpoint
            # Without its manifest it was never finished: else it would be kept as the newest, in place of better ones.
            self._store.delete(f"{checkpoint.key}/{MANIFEST_NAME}")
            warn(f"The checkpoint {self._store.uri_of(checkpoint.key)} is not used, {damage}")
        return None

    def _fetch(self, checkpoint: Checkpoint, folder: Path, *, adapter_only: bool) -> str | None:
        """Put a copy in `folder`, or say what is wrong with it."""
        try:
            self._store.download_tree(checkpoint.key, folder, paths=[ADAPTER] if adapter_only else None)
        except JobError as error:
            if error.reason is not Reason.STORAGE_NOT_FOUND:
                raise
            return f"because it is damaged: {error.message}"
        fault = adapter_fault(folder) if adapter_only else resume_fault(folder, self._world_size())
        if fault is not None:
            shutil.rmtree(folder)
        return fault

    def _world_size(self) -> int | None:
        value = self._identity.get("world_size")
        return value if isinstance(value, int) else None


def recorded_run(store: ObjectStore) -> dict[str, Any]:
    """What the newest checkpoint in a job's output says of its run; empty when there is none."""
    checkpoints = Checkpoints(store, {}, keep=0).all()
    found = checkpoints[-1].manifest.details.get("run") if checkpoints else None
    return found if isinstance(found, dict) else {}


def _rank(checkpoint: Checkpoint) -> tuple[float, int]:
    """Sort key, best first: lowest validation loss, then the earliest; without one, the newest."""
    loss = checkpoint.eval_loss
    return (loss, checkpoint.step) if loss is not None else (float("inf"), -checkpoint.step)
