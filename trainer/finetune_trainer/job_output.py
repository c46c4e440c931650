"""The place where a job's results go, and the metrics log that grows there while it runs."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from finetune_api.job import FineTuneJob
from finetune_api.outcome import Reason
from finetune_api.output import output_address, working_name
from finetune_trainer.errors import JobError
from finetune_trainer.publish.report import curves_from_metrics
from finetune_trainer.storage import ObjectStore, open_store
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.plan import TrainingPlan

METRICS = "metrics.jsonl"
LOCK = ".finetune.lock"


class JobOutput:
    """A job's output as one rank uses it. Only rank 0 reads and writes the store.

    Args:
        store: the output.
        scratch: folder for the metrics log when the output is not on this machine.
        is_first: whether this is rank 0.
    """

    def __init__(self, store: ObjectStore, scratch: Path, *, is_first: bool) -> None:
        self.store = store
        self._is_first = is_first
        self._remote = not isinstance(store, LocalStore)
        self.metrics_path = scratch / METRICS
        if not is_first:
            return
        if isinstance(store, LocalStore):
            self.metrics_path = store.folder / METRICS
            self._lock = _lock(store)
        elif store.exists(METRICS):
            store.download_file(METRICS, self.metrics_path)

    def save_metrics(self) -> None:
        """Bring the metrics log to the output; a local output has it already."""
        if self._is_first and self._remote and self.metrics_path.exists():
            self.store.upload_file(self.metrics_path, METRICS)

    def last_epoch_loss(self, plan: TrainingPlan) -> float | None:
        """Mean of the logged training losses of the last epoch, or None when none was logged."""
        first = plan.total_steps - plan.steps_per_epoch
        logged = [value for step, value in curves_from_metrics(self.metrics_path).loss if step > first]
        losses = [value for value in logged if value is not None]
        return sum(losses) / len(losses) if losses else None


def open_output(job: FineTuneJob, scratch: Path, ranks: Ranks) -> JobOutput:
    """The output of `job`.

    Raises:
        JobError: InvalidSpec, the job names none; OutputConflict, another run uses it right now.
    """
    address = output_address(job)
    if address is None:
        raise JobError(Reason.INVALID_SPEC, "The job names no output: write output.uri, or run it with --output-dir.")
    return JobOutput(open_store(address, work=working_name(job)), scratch, is_first=ranks.is_first)


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
