"""The place where a job's results go, and the metrics log that grows there while it runs."""

from __future__ import annotations

import json
import logging
import os
import socket
import weakref
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from finetune_api.job import FineTuneJob
from finetune_api.outcome import Reason
from finetune_api.output import output_address, working_name
from finetune_trainer.errors import JobError
from finetune_trainer.publish.report import curves_from_metrics
from finetune_trainer.storage import ObjectStore, open_store
from finetune_trainer.storage.lease import LEASE, Holder, Lease
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.storage.s3_slot import S3Slot
from finetune_trainer.storage.s3_store import S3Store
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.plan import TrainingPlan

_log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
LOCK = ".finetune.lock"
MEMORY = "memory.json"


class JobOutput:
    """A job's output as one rank uses it. Only rank 0 reads and writes the store.

    Args:
        store: the output.
        scratch: folder for the metrics log when the output is not on this machine.
        is_first: whether this is rank 0.
        job: the job's name, for whom it is in the way of.
        say: is told what has to be waited for.

    Raises:
        JobError: OutputConflict, another run uses it right now.
    """

    def __init__(
        self,
        store: ObjectStore,
        scratch: Path,
        *,
        is_first: bool,
        job: str = "",
        say: Callable[[str], None] = _log.warning,
    ) -> None:
        self.store = store
        self._is_first = is_first
        self._remote = not isinstance(store, LocalStore)
        self.metrics_path = scratch / METRICS
        self._lease: Lease | None = None
        self._release: Callable[[], object] = lambda: None
        if not is_first:
            return
        if isinstance(store, S3Store):
            holder = Holder(job, socket.gethostname(), os.getpid())
            self._lease = Lease(S3Slot(store.address, LEASE), store.uri, holder)
            self._lease.take(say)
            store.before_write = self._lease.check
            # Also for whoever forgets to close it: the next run would have to wait.
            self._release = weakref.finalize(self, self._lease.release)
        if isinstance(store, LocalStore):
            self.metrics_path = store.folder / METRICS
            self._lock = _lock(store)
        elif store.exists(METRICS):
            store.download_file(METRICS, self.metrics_path)

    @property
    def lost(self) -> bool:
        """Whether another run took the output over: nothing can be written any more, and training on is in vain."""
        return self._lease is not None and self._lease.lost

    def check(self) -> None:
        """Refuse to go on with an output that is no longer this run's.

        Raises:
            JobError: OutputConflict.
        """
        if self._lease is not None and self.lost:
            self._lease.check()

    def close(self) -> None:
        """Let others use the output."""
        self._release()

    def pack_bound(self) -> int | None:
        """Most tokens of a pack that an earlier attempt has found to fit; None where none ran out of memory."""
        if not self.store.exists(MEMORY):
            return None
        try:
            found = json.loads(self.store.read_bytes(MEMORY))["tokens_per_pack"]
        except (ValueError, TypeError, LookupError):
            return None
        return found if isinstance(found, int) and found > 0 else None

    def bound_packs(self, tokens: int) -> None:
        """Let later attempts make packs of at most so many tokens; any rank may say so, the one that ran out does."""
        self.store.write_bytes(MEMORY, json.dumps({"tokens_per_pack": tokens}).encode())

    def save_metrics(self) -> None:
        """Bring the metrics log to the output; a local output has it already."""
        if self._is_first and self._remote and self.metrics_path.exists():
            self.store.upload_file(self.metrics_path, METRICS)

    def save_files(self, files: list[Path], folder: Path) -> None:
        """Bring `files` to the output, each under its path in `folder`; files of that name are replaced."""
        for file in files:
            self.store.upload_file(file, file.relative_to(folder).as_posix())

    def last_epoch_loss(self, plan: TrainingPlan) -> float | None:
        """Mean of the logged training losses of the last epoch, or None when none was logged."""
        first = plan.total_steps - plan.steps_per_epoch
        logged = [value for step, value in curves_from_metrics(self.metrics_path).loss if step > first]
        losses = [value for value in logged if value is not None]
        return sum(losses) / len(losses) if losses else None


def open_output(
    job: FineTuneJob, scratch: Path, ranks: Ranks, *, say: Callable[[str], None] = _log.warning
) -> JobOutput:
    """The output of `job`; `say` is told when another run has to be waited for.

    Raises:
        JobError: InvalidSpec, the job names none; OutputConflict, another run uses it right now.
    """
    address = output_address(job)
    if address is None:
        raise JobError(Reason.INVALID_SPEC, "The job names no output: write output.uri, or run it with --output-dir.")
    store = open_store(address, work=working_name(job))
    return JobOutput(store, scratch, is_first=ranks.is_first, job=job.metadata.name, say=say)


def _lock(store: LocalStore) -> FileLock:
    """Held until the process ends: two runs in one folder would take each other's checkpoints."""
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(store.folder / LOCK, blocking=False)
        lock.acquire()
    except Timeout as error:
        raise JobError(
            Reason.OUTPUT_CONFLICT,
            f"Another run is using {store.uri} right now: wait for it, or choose another output.",
        ) from error
    except OSError as error:
        raise JobError(
            Reason.STORAGE_ACCESS_DENIED,
            f"{store.uri} cannot be written to ({error.strerror}): choose another output or mend its permissions.",
        ) from error
    return lock
