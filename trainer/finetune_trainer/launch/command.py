"""The launcher's command: checks the job, runs the workers of this node, and says once how the attempt ended."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from finetune_api.job import FineTuneJob
from finetune_api.load import load_job_file
from finetune_api.outcome import Reason, TerminationMessage
from finetune_trainer.errors import JobError
from finetune_trainer.launch import alone, elastic, environment, outcome_files
from finetune_trainer.launch.failures import exit_code, last_words, redact
from finetune_trainer.launch.memory_events import oom_kills
from finetune_trainer.launch.root_cause import RankEnd, Verdict, conclude
from finetune_trainer.launch.stop import LauncherStopped, StopWatch

WORKER_MODULE: Final = "finetune_trainer.worker"
"""Module whose main(job_path) does the work of one rank."""

_SHOWN_PROBLEMS = 3
_PATIENCE_BEYOND_GRACE_SECONDS = 3
"""What elastic needs to kill and collect workers that outlast their grace."""


def main(argv: Sequence[str] | None = None, *, worker_module: str = WORKER_MODULE) -> int:
    """Run the attempt; the exit code tells the user's failures (1-127) from the world's (128 and above)."""
    job_path = _parse(argv)
    announcement = Announcement(os.environ.get(environment.TERMINATION_MESSAGE_PATH) or None)
    try:
        job = _load(job_path)
        with tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as folder:
            verdict = _run(job, job_path, Path(folder), announcement, worker_module)
    except (Exception, KeyboardInterrupt) as error:
        # Anything that got out would end Python with 1, a code that blames the user.
        verdict = _launcher_failed(error)
    return announcement.make(verdict)


class Announcement:
    """Says how the attempt ended: into the termination message file, and as one sentence on stderr. Once."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._exit_code: int | None = None

    def make(self, verdict: Verdict) -> int:
        """Announce `verdict` unless another one was announced before; the exit code to end with."""
        with self._lock:
            if self._exit_code is None:
                self._exit_code = self._announce(verdict)
            return self._exit_code

    def _announce(self, verdict: Verdict) -> int:
        message, code = verdict.message, verdict.exit_code
        if not message.succeeded:
            _say(f"{message.reason or Reason.INTERNAL_ERROR}: {message.message}")
        if self._path is None:
            return code
        try:
            # Written in place: in a pod this file is a mount of its own, which nothing can be renamed onto.
            Path(self._path).write_bytes(message.to_bytes())
        except OSError as error:
            _say(f"The termination message could not be written to {self._path}: {error.strerror}.")
            # Without it nobody learns where the adapter is. Another attempt finds the finished output and says so.
            return code or exit_code(TerminationMessage(succeeded=False, reason=Reason.INTERNAL_ERROR))
        return code


def _parse(argv: Sequence[str] | None) -> Path:
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainer",
        description="Fine-tune a model from a FineTuneJob. Runs one attempt with all its worker processes.",
        epilog="Exit codes: 0 done; 1-127 the job has to be changed; 128 and above: start it again.",
    )
    parser.add_argument("job", metavar="JOB.yaml", type=Path, help="a FineTuneJob manifest or a bare LLMForge YAML")
    job: Path = parser.parse_args(argv).job
    return job


def _load(path: Path) -> FineTuneJob:
    """The job in `path`, its warnings printed.

    Raises:
        JobError: InvalidSpec, with the first problems.
    """
    result = load_job_file(path)
    for warning in result.warnings:
        _say(f"warning: {warning.path}: {warning.message}")
    if result.job is not None and not result.errors:
        return result.job
    shown = [f"{problem.path}: {problem.message}" if problem.path else problem.message for problem in result.errors]
    more = len(shown) - _SHOWN_PROBLEMS
    sentence = "; ".join(shown[:_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    raise JobError(Reason.INVALID_SPEC, f"{path} is not a valid job: {sentence}")


def _run(job: FineTuneJob, job_path: Path, folder: Path, announcement: Announcement, worker_module: str) -> Verdict:
    """Run the workers of this node with `folder` for their last words, and judge their ends."""
    grace_seconds = environment.grace_seconds(os.environ)
    oom_kills_before = oom_kills()

    def judge(failures: dict[int, elastic.ProcessFailure], stopped_by: str | None) -> Verdict:
        kills = (oom_kills() or 0) - (oom_kills_before or 0)
        ends = _rank_ends(folder, failures, stopped_by=stopped_by)
        return conclude(ends, stopped_by=stopped_by, oom_kills=kills, grace_seconds=grace_seconds)

    def end_at_once(signal_name: str) -> None:
        # The workers notice within a second that their launcher is gone.
        code = announcement.make(judge({}, signal_name))
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)

    failures: dict[int, elastic.ProcessFailure] = {}
    stopped_by: str | None = None
    try:
        with StopWatch(
            workers_run=lambda: outcome_files.any_started(folder),
            end_at_once=end_at_once,
            patience_seconds=grace_seconds + _PATIENCE_BEYOND_GRACE_SECONDS,
        ):
            failures = _prepared(job, job_path, folder, grace_seconds, worker_module)()
    except LauncherStopped as stop:
        stopped_by = str(stop)
    return judge(failures, stopped_by)


def _prepared(
    job: FineTuneJob, job_path: Path, folder: Path, grace_seconds: int, worker_module: str
) -> Callable[[], dict[int, elastic.ProcessFailure]]:
    """Set what the workers inherit; what runs them to their end, and says which failed."""
    # Read by torch as it is imported. The warnings of its C++ side carry stack traces for everyday things, such as a
    # node that is not up yet.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    settings = elastic.node_settings(os.environ, gpus=elastic.visible_gpus())
    notice = world_size_notice(job, settings) if environment.EXPECTED_WORLD_SIZE not in os.environ else None
    if notice is not None:
        _say(notice)
    os.environ.update(elastic.worker_defaults(settings, os.environ))
    os.environ[environment.OUTCOME_DIR] = str(folder)
    os.environ[environment.LAUNCHER_PID] = str(os.getpid())
    # A variable and not elastic's argument: a torch that does not know it yet only ignores it.
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_seconds)
    worker = ["finetune_trainer.launch.worker_process", worker_module, str(job_path)]
    if settings.alone and settings.nproc == 1:
        return partial(alone.run_worker, worker, grace_seconds=grace_seconds)
    arguments = elastic.torch_arguments(
        settings, free_port=elastic.find_free_port(), log_dir=folder / "elastic", worker=worker
    )
    return partial(elastic.run_workers, arguments)


def world_size_notice(job: FineTuneJob, settings: elastic.NodeSettings) -> str | None:
    """What to tell a person whose machine runs another number of workers than the job asks for; None if equal."""
    asked = job.spec.num_devices or job.spec.workers.world_size
    if not settings.alone or asked == settings.nproc:
        return None
    return (
        f"warning: the job asks for {asked} worker processes and {settings.nproc} run here: an optimizer step sees "
        f"{settings.nproc} rows for every {asked} of the cluster's; gradient_accumulation_steps can make up for it."
    )


def _rank_ends(folder: Path, failures: dict[int, elastic.ProcessFailure], *, stopped_by: str | None) -> list[RankEnd]:
    """How each rank of this node ended; never empty, for a node that has workers has a first one."""
    records = outcome_files.read_all(folder)
    unknown = outcome_files.RankRecord(outcome=None, written_at=None)
    ends: list[RankEnd] = []
    for rank in sorted(records.keys() | failures.keys() or {0}):
        record, failure = records.get(rank, unknown), failures.get(rank)
        code = failure.code if failure else (0 if stopped_by is None else None)
        at = record.written_at or (failure.at if failure else time.time())
        ends.append(RankEnd(rank=rank, code=code, outcome=record.outcome, at=at))
    return ends


def _launcher_failed(error: BaseException) -> Verdict:
    """The verdict when no worker had a part in the end."""
    # World size 2 stands for "more than one node": alone, no connection can be lost before there are workers.
    nodes = 2 if os.environ.get("PET_NNODES", "1") != "1" else 1
    message = last_words(error, rank=0, world_size=nodes, environ=os.environ).model_copy(update={"rank": None})
    if message.reason is Reason.INTERNAL_ERROR:
        _say("".join(traceback.format_exception(error)))
    return Verdict(message, exit_code(message))


def _say(text: str) -> None:
    print(redact(text.rstrip(), os.environ), file=sys.stderr, flush=True)
