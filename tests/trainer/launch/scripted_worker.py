"""Stands in for the real worker: each rank does what FINETUNE_TEST_SCRIPT tells it, without loading torch."""

from __future__ import annotations

import atexit
import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from finetune_api.outcome import AdapterResult, CheckpointResult, Reason, TerminationMessage
from finetune_trainer.errors import JobError
from finetune_trainer.signals import StopFlag

SCRIPT = "FINETUNE_TEST_SCRIPT"
"""JSON: rank -> name of an action below."""

ADAPTER = AdapterResult(uri="s3://bucket/adapter", base_model="base", sha256="0" * 64, size_bytes=1)


def succeed() -> TerminationMessage:
    return TerminationMessage(succeeded=True, adapter=ADAPTER)


def fail_on_data() -> TerminationMessage:
    raise JobError(Reason.DATA_INVALID, "train.jsonl:3 is not JSON; mend the line." + " Details." * 1000)


def lose_peer() -> TerminationMessage:
    folder = Path(os.environ["FINETUNE_OUTCOME_DIR"])
    pid_file = Path(os.environ["FINETUNE_TEST_FOLDER"]) / "pid-1"
    # Like gloo: the connection breaks when the other process is gone, not when it writes its last words.
    while not pid_file.exists() or _lives(int(pid_file.read_text())):
        time.sleep(0.01)
    assert folder.is_dir()
    raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_stop() -> TerminationMessage:
    with StopFlag() as stop:
        _ready()
        while not stop.is_set():
            time.sleep(0.01)
    return TerminationMessage(
        succeeded=False,
        reason=Reason.TERMINATED,
        message="Stopped.",
        checkpoint=CheckpointResult(uri="s3://bucket/step-7", step=7),
    )


def ignore_stop() -> TerminationMessage:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _ready()
    while True:
        time.sleep(1)


def die_of(number: signal.Signals) -> Callable[[], TerminationMessage]:
    def die() -> TerminationMessage:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), number)
        raise AssertionError("unreachable")

    return die


def vanish() -> TerminationMessage:
    os._exit(0)


def fill_disk() -> TerminationMessage:
    raise OSError(errno.ENOSPC, "No space left on device", "/cache/model.safetensors")


def exhaust_memory() -> TerminationMessage:
    raise MemoryError


def stumble() -> TerminationMessage:
    raise ValueError(f"a bug that shows {os.environ['HF_TOKEN']}")


def succeed_and_crash() -> TerminationMessage:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    atexit.register(os.abort)
    return succeed()


ACTIONS: dict[str, Callable[[], TerminationMessage]] = {
    "succeed": succeed,
    "fail_on_data": fail_on_data,
    "lose_peer": lose_peer,
    "wait_for_stop": wait_for_stop,
    "ignore_stop": ignore_stop,
    "kill": die_of(signal.SIGKILL),
    "segfault": die_of(signal.SIGSEGV),
    "vanish": vanish,
    "fill_disk": fill_disk,
    "exhaust_memory": exhaust_memory,
    "stumble": stumble,
    "succeed_and_crash": succeed_and_crash,
}


def _ready() -> None:
    (Path(os.environ["FINETUNE_TEST_FOLDER"]) / f"ready-{os.environ['RANK']}").touch()


def main(job_path: Path) -> TerminationMessage:
    assert job_path.is_file()
    rank = os.environ["RANK"]
    folder = Path(os.environ["FINETUNE_TEST_FOLDER"])
    (folder / f"environment-{rank}.json").write_text(json.dumps(dict(os.environ)))
    pid = folder / f"pid-{rank}.partial"
    pid.write_text(str(os.getpid()))
    pid.rename(folder / f"pid-{rank}")
    return ACTIONS[json.loads(os.environ[SCRIPT])[rank]]()
