"""Starts the trainer for `finetune run`, shows how far it is, passes signals on and reads its last words."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from finetune_api.outcome import Reason, TerminationMessage, TrainerStatus
from finetune_cli.output import SHARED_CPU
from finetune_cli.progress import bar_state, progress_endpoint

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_attempt(job_text: str) -> tuple[int, TerminationMessage | None]:
    """Run one attempt of the job in `job_text`; the trainer's exit code (128 + n for signal n) and its last words."""
    with tempfile.TemporaryDirectory(prefix="finetune-run-") as folder:
        private = Path(folder)  # only its owner may enter it
        job, token_file, message = private / "job.yaml", private / "token", private / "termination-message"
        job.write_text(job_text, encoding="utf-8")
        token = secrets.token_urlsafe(32)
        token_file.touch(mode=0o600)
        token_file.write_text(token, encoding="ascii")
        environ = {**SHARED_CPU, **os.environ, "FINETUNE_TERMINATION_MESSAGE_PATH": str(message)}
        console = Console(highlight=False)
        if console.is_terminal:
            exit_code = _with_bar(console, job, environ, token, token_file)
        else:
            with forwarded_signals(lambda: None) as started:
                exit_code = started(_start(job, environ, stdout=None)).wait()
        last_words = TerminationMessage.parse(message.read_bytes()) if message.is_file() else None
    return exit_code if exit_code >= 0 else 128 - exit_code, last_words


def _start(job: Path, environ: Mapping[str, str], *, stdout: int | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_cli.attached", str(os.getpid()), str(job)],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT if stdout is not None else None,
        text=True,
        errors="replace",
        # Ctrl-C reaches every process of the terminal's group; the trainer hears of it from us, once.
        process_group=0,
    )


def _with_bar(console: Console, job: Path, environ: dict[str, str], token: str, token_file: Path) -> int:
    columns = (SpinnerColumn(), TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[details]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("Starting", total=None, details="")
        with progress_endpoint(token, lambda status: _advance(progress, task, status)) as url:
            environ |= {
                "KUBEFLOW_TRAINER_SERVER_URL": url,
                "KUBEFLOW_TRAINER_SERVER_TOKEN": str(token_file),
                # The lines that the bar would only repeat.
                "FINETUNE_CONSOLE": "quiet",
            }
            environ.pop("KUBEFLOW_TRAINER_SERVER_CA_CERT", None)
            notice = "Stopping: the trainer saves a checkpoint. Press Ctrl-C again to stop at once."
            with forwarded_signals(lambda: console.print(notice, style="yellow")) as started:
                child = started(_start(job, environ, stdout=subprocess.PIPE))
                assert child.stdout is not None  # noqa: S101  it was asked for
                for line in child.stdout:
                    console.print(styled_line(line.rstrip("\n")), soft_wrap=True)
                return child.wait()


def _advance(progress: Progress, task: TaskID, status: TrainerStatus) -> None:
    state = bar_state(status)
    progress.update(
        task, description=state.phase, completed=state.completed, total=state.total, details=state.details, refresh=True
    )


def styled_line(line: str) -> Text:
    """A line of the trainer's, its warnings and its last words in colour."""
    if line.startswith("warning: "):
        return Text(line, "yellow")
    if line.partition(": ")[0] in list(Reason):
        return Text(line, "bold red")
    return Text.from_ansi(line)


@contextmanager
def forwarded_signals(
    on_first: Callable[[], None],
) -> Iterator[Callable[[subprocess.Popen[str]], subprocess.Popen[str]]]:
    """Within the block, signals that would end us go to the trainer instead, which then ends in its own way.

    Yields a function that takes the process; a signal that came before is passed on then.

    Args:
        on_first: called at the first signal.
    """
    children: list[subprocess.Popen[str]] = []
    received: list[int] = []

    def forward(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        if len(received) == 1:
            on_first()
        for child in children:
            child.send_signal(signum)

    def started(child: subprocess.Popen[str]) -> subprocess.Popen[str]:
        children.append(child)
        for signum in received:
            child.send_signal(signum)
        return child

    previous = {name: signal.signal(name, forward) for name in FORWARDED_SIGNALS}
    try:
        yield started
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
