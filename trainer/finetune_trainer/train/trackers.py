"""Sends a run's figures to the experiment tracker that the job names, and never lets training wait for it.

A thread talks to the tracker's library. Whatever goes wrong there is told once and the run goes on: every figure is in
metrics.jsonl too.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState  # type: ignore[import-untyped]

from finetune_api.training import Logger
from finetune_trainer.errors import first_line
from finetune_trainer.train import tracker_runs
from finetune_trainer.train.console import Console
from finetune_trainer.train.tracker_runs import Opened, RunFacts
from finetune_trainer.train.tracker_settings import (
    NAMES,
    MlflowConfig,
    TensorboardConfig,
    WandbConfig,
    read_config,
    without_secrets,
)

FINISH_SECONDS = 30.0
"""How long the end of a run waits for a tracker: what wandb and MLflow take to give up on a server."""

STOP_SECONDS = 10.0

RETRY_SECONDS = 60.0
"""Between two tries to reach a tracker that did not answer when the run began."""

T = TypeVar("T")

WAITING = 10_000
"""How many sets of figures wait for a tracker at most; a run logs some hundreds."""


def run_key(output: str, identity: Mapping[str, Any]) -> str:
    """A key for `open_trackers`: another output or another training is another run.

    Args:
        output: its address.
        identity: what decides the course of training.
    """
    return json.dumps([output, identity], sort_keys=True, default=str)


class Trackers:
    """One run at one tracker, or at none. To be used from one thread of global rank 0.

    Args:
        provider: of the contract; None for no tracker.
        start: reaches the tracker and begins or continues the run.
        console: where a failure is told, once, and the run's address.
        environ: whose secrets are left out of what is told.
        folder: where the tracker writes.
        kept: pattern in `folder` of the files that belong to the job's output; None for no file.
        retry_seconds: between two tries to start.
    """

    def __init__(
        self,
        provider: str | None = None,
        start: Callable[[], Opened] | None = None,
        *,
        console: Console | None = None,
        environ: Mapping[str, str] | None = None,
        folder: Path = Path(),
        kept: str | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._provider = provider or ""
        self._console = console
        self._environ = environ or {}
        self._folder, self._kept = folder, kept
        self._retry_seconds = retry_seconds
        self._waiting: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._closing, self._told, self._silent = threading.Event(), threading.Event(), threading.Event()
        self._succeeded = True
        self._thread: threading.Thread | None = None
        if start is not None:
            self._thread = threading.Thread(target=self._work, args=[start], name="experiment-tracker", daemon=True)
            self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of one optimizer step, under the names of metrics.jsonl; returns at once."""
        if self._thread is None or self._closing.is_set():
            return
        if self._waiting.qsize() >= WAITING:
            self._warn("it is too far behind")
            return
        self._waiting.put((dict(values), step))

    def finish(self, *, succeeded: bool = True, seconds: float | None = None) -> None:
        """Send what is left and close the run; a second call does nothing.

        Args:
            succeeded: False marks the run as ended early. The next attempt continues it.
            seconds: how long to wait at most; by default FINISH_SECONDS, and less for a pod that is taken away.
        """
        seconds = seconds or (FINISH_SECONDS if succeeded else STOP_SECONDS)
        if self._thread is None or self._closing.is_set():
            return
        self._succeeded = succeeded
        self._closing.set()
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"it did not take the last of them within {seconds:.0f} s")
        self._silent.set()

    def files(self) -> list[Path]:
        """Files that belong to the job's output: TensorBoard's events, runs of wandb that wait for `wandb sync`."""
        return sorted(path for path in self._folder.glob(self._kept) if path.is_file()) if self._kept else []

    def _work(self, start: Callable[[], Opened]) -> None:
        opened = self._reached(start)
        if opened is None:
            return
        tracker = opened.tracker
        self._tried(lambda: tracker.store_init_configuration(opened.config))
        while (item := self._waiting.get()) is not None:
            values, step = item
            self._tried(partial(tracker.log, tracker_runs.named(self._provider, values), step=step))
        self._tried(lambda: tracker_runs.end(tracker, succeeded=self._succeeded))

    def _reached(self, start: Callable[[], Opened]) -> Opened | None:
        """The run as soon as the tracker answers; None when training ends before that."""
        while (opened := self._tried(start)) is None:
            if self._closing.wait(self._retry_seconds):
                return None
        if opened.address is not None and self._console is not None:
            shown = without_secrets(opened.address, self._environ)
            self._console.phase(f"Metrics go to {NAMES[self._provider]} too: {shown}")
        return opened

    def _tried(self, call: Callable[[], T]) -> T | None:
        """What `call` returns; None after an error, which is told: whatever a tracker does, training goes on."""
        try:
            return call()
        except Exception as error:
            self._warn(without_secrets(first_line(error), self._environ))
            return None

    def _warn(self, why: str) -> None:
        if self._told.is_set() or self._silent.is_set() or self._console is None:
            return
        self._told.set()
        self._console.warning(
            f"{NAMES[self._provider]} did not take metrics of this run ({why}): training goes on, and metrics.jsonl "
            "at the output has all of them."
        )


def open_trackers(
    logger: Logger | None,
    *,
    run_name: str,
    run_key: str,
    folder: Path,
    config: Mapping[str, Any],
    console: Console,
    resumed_at_step: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Trackers:
    """Begin or continue this job's run at its tracker, in a thread; to be called on global rank 0 only.

    Args:
        logger: of the job, checked by `check_tracker` before.
        run_name: what the run is called where provider_config does not name it.
        run_key: the same in all attempts of one training, and in no other.
        folder: where the tracker may write; `files` are to be kept under their paths in it.
        config: what was trained with; no secrets.
        console: tells the run's address, and the first failure.
        resumed_at_step: optimizer step of the checkpoint that this attempt continues from.

    Raises:
        JobError: InvalidSpec, provider_config is wrong.
    """
    if logger is None:
        return Trackers()
    # accelerate's trackers refuse to log without it.
    PartialState()
    facts = RunFacts(run_name, run_key, folder, config, resumed_at_step)
    settings = read_config(logger, environ)
    start: Callable[[], Opened]
    kept: str | None = None
    match settings:
        case WandbConfig():
            folder.mkdir(parents=True, exist_ok=True)
            offline = environ.get("WANDB_MODE", settings.mode) == "offline"
            if offline and settings.dir is None and "WANDB_DIR" not in environ:
                kept = "wandb/offline-run-*/**/*"
            start = partial(tracker_runs.start_wandb, settings, facts, environ)
        case MlflowConfig():
            start = partial(tracker_runs.start_mlflow, settings, facts)
        case TensorboardConfig():
            kept = "tensorboard/*" if settings.logging_dir is None else None
            start = partial(tracker_runs.start_tensorboard, settings, facts)
    return Trackers(logger.provider, start, console=console, environ=environ, folder=folder, kept=kept)
