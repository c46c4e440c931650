"""Checkpoints are uploaded while training goes on, and a store that is away for a while costs no training.

One thread does it, so that they become complete in the order in which they were made. It ends with the process and
never holds it up.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from finetune_api.outcome import CheckpointResult, Reason, is_retryable
from finetune_trainer.errors import JobError
from finetune_trainer.storage import MANIFEST_NAME
from finetune_trainer.storage.errors import local_errors
from finetune_trainer.storage.manifest import tree_files
from finetune_trainer.train.checkpoint import Checkpoints, Warn

WAITING = 2
"""Checkpoints that may be unfinished at the same time: each takes its size of the local disk."""
PAUSE_SECONDS = wait_exponential(max=60.0)
"""1, 2, 4 and so on, up to a minute."""
HURRIED_PAUSE_SECONDS = 2.0
"""Longest pause between tries while somebody waits for the end."""
BLOCKED_SECONDS = 600.0
"""Other ranks wait with the one that is held up, and give up some time themselves."""
END_SECONDS = 5.0


@dataclass
class _Item:
    """A folder that waits for its upload."""

    folder: Path
    step: int
    eval_loss: float | None
    details: dict[str, Any]
    sizes: dict[str, int]
    """Of its files, in bytes, when it was handed over."""
    complete: bool = field(default=False)
    """In the store; older ones may still have to go."""


class CheckpointWriter:
    """Saves checkpoints in the background. Used by one thread, that of the training loop.

    A fault that may pass is tried again for as long as it takes. One that does not pass is raised by every later
    call of `save`, `check` and `flush`, and nothing is uploaded any more.

    Args:
        checkpoints: where they go; nobody else writes there meanwhile.
        warn: is told when uploads begin to fail and when they work again.
        pause_seconds: seconds until the next try, by the state of the tries so far.
        blocked_seconds: how long a `save` may be held up by earlier ones.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        warn: Warn,
        *,
        pause_seconds: Callable[[RetryCallState], float] = PAUSE_SECONDS,
        blocked_seconds: float = BLOCKED_SECONDS,
    ) -> None:
        self.last: CheckpointResult | None = None
        """The newest that is complete in the store."""
        self._checkpoints = checkpoints
        self._warn = warn
        self._pause_seconds = pause_seconds
        self._blocked_seconds = blocked_seconds
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        """Unfinished ones, the one that is being uploaded first."""
        self._passing: JobError | None = None
        """Why the last try failed, while it is tried again."""
        self._lasting: Exception | None = None
        self._told = False
        self._hurried = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            # What ended the block came first.
            if error is None:
                raise

    @property
    def waiting(self) -> int:
        """How many are not finished yet."""
        return len(self._items)

    def save(self, folder: Path, *, step: int, eval_loss: float | None, details: Mapping[str, Any]) -> None:
        """Take over `folder` as the checkpoint of `step`: it is uploaded and then removed; nobody may touch it.

        Waits while two are unfinished.

        Raises:
            JobError: the fault of an earlier one that does not pass, or that lasted for `blocked_seconds`.
        """
        with local_errors(folder):
            sizes = {path: (folder / path).stat().st_size for path in tree_files(folder) if path != MANIFEST_NAME}
        item = _Item(folder, step, eval_loss, copy.deepcopy(dict(details)), sizes)
        self._wait(lambda: len(self._items) < WAITING, self._blocked_seconds)
        with self._changed:
            if self._closed:
                raise RuntimeError("a checkpoint was saved after the writer was closed")
            self._items.append(item)
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the fault that ended the uploads, if there was one.

        Raises:
            JobError: as the store does.
        """
        if self._lasting is not None:
            self._told = True
            raise self._lasting

    def flush(self, patience_seconds: float) -> None:
        """Return when all are complete in the store.

        Raises:
            JobError: why the last try failed, or that it takes longer than `patience_seconds`.
        """
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
        try:
            self._wait(lambda: not self._items, patience_seconds)
        finally:
            self._hurried = False

    def close(self) -> None:
        """End the uploads; what is not complete yet stays incomplete.

        Raises:
            JobError: the fault that ended them earlier, unless it was raised before.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(END_SECONDS)
        if not self._told:
            self.check()

    def _wait(self, done: Callable[[], bool], patience_seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: done() or self._lasting is not None, patience_seconds)
            self.check()
            if done():
                return
            step = self._items[0].step
            raise self._passing or JobError(
                Reason.STORAGE_UNAVAILABLE,
                f"The checkpoint of step {step} could not be brought to {self._checkpoints.result(step).uri} within "
                f"{patience_seconds:.0f} s: check the network and the store.",
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if self._closed:
                    return
                item = self._items[0]
            try:
                self._persist(item)
            except Exception as error:
                # Whatever it was, the training loop has to hear of it.
                with self._changed:
                    self._lasting = error
                    self._changed.notify_all()
                return
            shutil.rmtree(item.folder, ignore_errors=True)
            with self._changed:
                self._items.popleft()
                self._changed.notify_all()

    def _persist(self, item: _Item) -> None:
        """Upload it, and again as long as that may help."""
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=lambda _: self._closed,
            wait=self._pause_seconds,
            sleep=self._pause,
            before_sleep=lambda state: self._fails(item, state),
            reraise=True,
        )
        retrying(self._try, item)
        if self._passing is not None:
            self._passing = None
            self._warn(f"Checkpoints can be saved again: {self._checkpoints.result(item.step).uri} is complete.")

    def _try(self, item: _Item) -> None:
        if not item.complete:
            manifest = self._checkpoints.seal(
                item.folder, step=item.step, eval_loss=item.eval_loss, details=item.details
            )
            # A folder that is being removed must not be taken for a smaller checkpoint.
            if {path: entry.size_bytes for path, entry in manifest.files.items()} != item.sizes:
                raise RuntimeError(f"the checkpoint of step {item.step} was changed before its upload")
            self.last = self._checkpoints.upload(item.folder, item.step)
            item.complete = True
        self._checkpoints.prune()

    def _fails(self, item: _Item, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        first, self._passing = self._passing is None, error if isinstance(error, JobError) else None
        if first:
            self._warn(f"The checkpoint of step {item.step} waits, training goes on: {error}")

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if self._hurried:
                self._changed.wait_for(lambda: self._closed, min(seconds, HURRIED_PAUSE_SECONDS))
            else:
                self._changed.wait_for(lambda: self._closed or self._hurried, seconds)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, JobError) and is_retryable(error.exit_code)
