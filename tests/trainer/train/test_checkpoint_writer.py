"""Checkpoints in the background: complete, in order, tried again while that may help, and never in the way."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.checkpoint_writer import CheckpointWriter

PATIENCE_SECONDS = 30.0


class Store(LocalStore):
    """A folder whose uploads and removals a test holds up or lets fail."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.open = threading.Event()
        self.open.set()
        self.fault: JobError | Exception | None = None
        self.prune_fault: JobError | None = None
        self.tries = 0
        self.uploaded: list[str] = []

    def upload_file(self, file: Path, key: str) -> None:
        self.open.wait(PATIENCE_SECONDS)
        self.tries += 1
        if self.fault is not None:
            raise self.fault
        super().upload_file(file, key)
        self.uploaded.append(key)

    def delete_tree(self, prefix: str) -> None:
        self.tries += 1
        if self.prune_fault is not None:
            raise self.prune_fault
        super().delete_tree(prefix)


class Run:
    """A training loop that saves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "out")
        self.warnings: list[str] = []
        self.checkpoints = Checkpoints(self.store, {"seed": 1}, keep=1)
        self.writer = CheckpointWriter(
            self.checkpoints, self.warnings.append, pause_seconds=lambda _: 0.01, blocked_seconds=PATIENCE_SECONDS
        )

    def made(self, step: int) -> Path:
        folder = self.folder / f"made-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights of %d" % step)
        (folder / "optimizer.pt").write_bytes(b"moments")
        return folder

    def save(self, step: int, loss: float | None = None) -> None:
        self.writer.save(self.made(step), step=step, eval_loss=loss, details={"epoch": step / 10})

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.checkpoints.all()]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A loop whose writer is ended whatever happens."""
    run = Run(tmp_path)
    yield run
    run.store.open.set()
    run.writer._told = True
    run.writer.close()


def until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fail when it takes too long."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


AWAY = JobError(Reason.STORAGE_UNAVAILABLE, "The store answered 503: try again later.")
DENIED = JobError(Reason.STORAGE_ACCESS_DENIED, "The credentials may not write: grant access.")
LASTING = [
    DENIED,
    JobError(Reason.DISK_FULL, "The store is full: free some."),
    JobError(Reason.OUTPUT_CONFLICT, "Another run writes there: wait for it."),
    RuntimeError("a mistake of our own"),
]


def test_a_saved_folder_is_uploaded_manifest_last_and_then_gone(run: Run) -> None:
    run.store.open.clear()
    run.save(10, loss=0.5)
    assert run.writer.last is None
    run.store.open.set()
    run.writer.flush(PATIENCE_SECONDS)
    assert run.writer.last == run.checkpoints.result(10)
    assert run.store.uploaded[-1] == "checkpoints/step-00000010/manifest.json"
    assert not (run.folder / "made-10").exists()
    (found,) = run.checkpoints.all()
    assert (found.step, found.eval_loss, found.manifest.details["epoch"]) == (10, 0.5, 1.0)


def test_what_need_not_be_kept_is_removed(run: Run) -> None:
    for step, loss in ((1, 0.9), (2, 0.1), (3, 0.5), (4, 0.6)):
        run.save(step, loss)
    run.writer.flush(PATIENCE_SECONDS)
    assert run.steps() == [2, 4]


def test_a_third_save_waits_until_one_is_done(run: Run) -> None:
    run.store.open.clear()
    run.save(1)
    run.save(2)
    third = threading.Thread(target=run.save, args=(3,))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    assert run.writer.waiting == 2
    run.store.open.set()
    third.join(PATIENCE_SECONDS)
    assert not third.is_alive()
    run.writer.flush(PATIENCE_SECONDS)
    assert run.writer.last == run.checkpoints.result(3)


def test_a_save_that_waits_too_long_says_why(run: Run) -> None:
    run.writer._blocked_seconds = 0.2
    run.store.fault = AWAY
    run.save(1)
    run.save(2)
    with pytest.raises(JobError, match="answered 503"):
        run.save(3)


def test_details_are_those_of_the_moment(run: Run) -> None:
    run.store.open.clear()
    metrics = {"eval_loss": 0.5}
    run.writer.save(run.made(1), step=1, eval_loss=None, details={"metrics": metrics})
    metrics["eval_loss"] = 0.1
    run.store.open.set()
    run.writer.flush(PATIENCE_SECONDS)
    assert run.checkpoints.all()[0].manifest.details["metrics"] == {"eval_loss": 0.5}


def test_a_fault_that_passes_is_told_once_and_costs_no_training(run: Run) -> None:
    run.store.fault = AWAY
    run.save(1)
    run.save(2)
    until(lambda: run.store.tries > 5)
    run.writer.check()
    assert run.writer.last is None
    assert run.steps() == []
    assert run.warnings == [f"The checkpoint of step 1 waits, training goes on: {AWAY.message}"]
    run.store.fault = None
    run.writer.flush(PATIENCE_SECONDS)
    assert run.steps() == [2]
    assert run.warnings[1:] == [
        f"Checkpoints can be saved again: {run.checkpoints.result(1).uri} is complete.",
    ]


def test_what_is_complete_is_not_uploaded_again_where_only_old_ones_cannot_go(run: Run) -> None:
    run.save(1)
    run.writer.flush(PATIENCE_SECONDS)
    run.store.prune_fault = AWAY
    before = len(run.store.uploaded)
    run.save(2)
    until(lambda: bool(run.warnings) and run.store.tries > 10)
    assert run.writer.last == run.checkpoints.result(2)
    assert len(run.store.uploaded) == before + 3
    run.store.prune_fault = None
    run.writer.flush(PATIENCE_SECONDS)
    assert run.steps() == [2]


@pytest.mark.parametrize("fault", LASTING, ids=lambda fault: type(fault).__name__ + str(getattr(fault, "reason", "")))
def test_a_fault_that_does_not_pass_is_raised_by_whatever_comes_next(run: Run, fault: Exception) -> None:
    run.store.fault = fault
    run.save(1)
    until(lambda: run.writer._lasting is not None)
    assert run.store.tries == 1
    for call in (run.writer.check, lambda: run.save(2), lambda: run.writer.flush(PATIENCE_SECONDS)):
        with pytest.raises(type(fault)) as caught:
            call()
        assert caught.value is fault
    # It was told; whoever closes has other things to say by now.
    run.writer.close()


def test_closing_tells_a_fault_that_nobody_has_heard_of(run: Run) -> None:
    run.store.fault = DENIED
    run.save(1)
    until(lambda: run.writer._lasting is not None)
    with pytest.raises(JobError, match="grant access"):
        run.writer.close()


def test_what_ended_the_training_is_not_hidden_by_the_store(run: Run) -> None:
    run.store.fault = DENIED

    def train() -> None:
        with run.writer:
            run.save(1)
            until(lambda: run.writer._lasting is not None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


def test_a_flush_gives_up_in_time_with_the_last_fault(run: Run) -> None:
    run.store.fault = AWAY
    run.save(1)
    started = time.monotonic()
    with pytest.raises(JobError, match="answered 503") as caught:
        run.writer.flush(0.3)
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
    assert time.monotonic() - started < 5


def test_a_flush_of_a_store_that_says_nothing_gives_up_too(run: Run) -> None:
    run.store.open.clear()
    run.save(7)
    with pytest.raises(JobError, match=r"step 7 .* within 0 s") as caught:
        run.writer.flush(0.2)
    assert caught.value.exit_code >= 128


def test_a_flush_does_not_wait_for_the_next_try(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.writer._pause_seconds = lambda _: 3600.0
    run.store.fault = AWAY
    run.save(1)
    until(lambda: bool(run.warnings))
    run.store.fault = None
    run.writer.flush(PATIENCE_SECONDS)
    run.writer.close()
    assert run.steps() == [1]


def test_a_folder_that_is_taken_away_never_becomes_a_smaller_checkpoint(run: Run) -> None:
    run.store.fault = AWAY
    run.save(1)
    until(lambda: bool(run.warnings))
    (run.folder / "made-1" / "optimizer.pt").unlink()
    run.store.fault = None
    with pytest.raises(RuntimeError, match="was changed"):
        run.writer.flush(PATIENCE_SECONDS)
    assert run.steps() == []


EXIT = """
import sys, time
from pathlib import Path
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
class Silent(LocalStore):
    def upload_file(self, file, key):
        time.sleep(600)
root = Path(sys.argv[1])
(root / "made").mkdir()
(root / "made" / "a").write_bytes(b"1")
writer = CheckpointWriter(Checkpoints(Silent(root / "out"), {}, 1), print)
writer.save(root / "made", step=1, eval_loss=None, details={})
"""


def test_an_upload_that_hangs_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", EXIT, str(tmp_path)], check=True, timeout=240)
