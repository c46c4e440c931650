"""The launcher with real worker processes: what ends them, and what the launcher then says and returns."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from finetune_api.outcome import EXIT_CODES, Reason, TerminationMessage
from tests.trainer.launch.launcher_process import LauncherProcess, wait_until

SECRET = "hf_abcdefghijklmnop"


@dataclass(frozen=True)
class Case:
    actions: tuple[str, ...]
    exit_code: int
    reason: Reason | None
    rank: int | None
    says: str
    environ: dict[str, str] = field(default_factory=dict)
    silent: bool = True
    """Whether stderr holds the one sentence and nothing else, no stack trace above all."""


CASES = {
    "success carries rank 0's message": Case(("succeed", "succeed"), 0, None, 0, ""),
    "a user's error outweighs the peer failure it causes": Case(
        ("lose_peer", "fail_on_data"), EXIT_CODES[Reason.DATA_INVALID], Reason.DATA_INVALID, 1, "train.jsonl:3"
    ),
    "both ranks find the same error": Case(
        ("fail_on_data", "fail_on_data"), EXIT_CODES[Reason.DATA_INVALID], Reason.DATA_INVALID, None, "train.jsonl:3"
    ),
    "a segmentation fault has a sentence": Case(("segfault",), 139, Reason.INTERNAL_ERROR, 0, "SIGSEGV"),
    "kill -9 outweighs the peer failure it causes": Case(
        ("lose_peer", "kill"), 137, Reason.INTERNAL_ERROR, 1, "Rank 1 was ended by SIGKILL"
    ),
    "exit code 0 without last words is no success": Case(
        ("vanish",), EXIT_CODES[Reason.INTERNAL_ERROR], Reason.INTERNAL_ERROR, 0, "did not say why"
    ),
    "a full disk names the file": Case(
        ("fill_disk",), EXIT_CODES[Reason.DISK_FULL], Reason.DISK_FULL, 0, "/cache/model.safetensors"
    ),
    "too little memory names the knobs": Case(
        ("exhaust_memory",), EXIT_CODES[Reason.OUT_OF_MEMORY], Reason.OUT_OF_MEMORY, 0, "train_batch_size_per_device"
    ),
    "a bug is retryable and its trace hides secrets": Case(
        ("stumble",),
        EXIT_CODES[Reason.INTERNAL_ERROR],
        Reason.INTERNAL_ERROR,
        0,
        "ValueError: a bug that shows ***",
        {"HF_TOKEN": SECRET},
        silent=False,
    ),
    "a crash after success is a success": Case(("succeed_and_crash",), 0, None, 0, "", silent=False),
    "another world size than the operator's ends the attempt": Case(
        ("succeed",),
        EXIT_CODES[Reason.WORLD_SIZE_MISMATCH],
        Reason.WORLD_SIZE_MISMATCH,
        0,
        "1 worker processes found each other where the job asks for 4",
        {"FINETUNE_EXPECTED_WORLD_SIZE": "4"},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_attempt_ends_with_its_root_cause(case: Case, tmp_path: Path) -> None:
    environ = {"FINETUNE_EXPECTED_WORLD_SIZE": str(len(case.actions)), **case.environ}
    with LauncherProcess(tmp_path, *case.actions, environ=environ) as launcher:
        assert launcher.end() == case.exit_code, launcher.stderr()
        message = launcher.message()
    assert (message.succeeded, message.reason) == (case.exit_code == 0, case.reason)
    assert case.says in message.message
    if case.rank is not None:
        assert message.rank == case.rank
    stderr = launcher.stderr()
    assert SECRET not in stderr
    if case.silent:
        lines = stderr.splitlines()
        assert len(lines) == (0 if case.exit_code == 0 else 1), stderr
    else:
        assert ("Traceback" in stderr) == (not message.succeeded)
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert left == [], "the launcher leaves no folders behind"


def test_workers_get_threads_for_their_share_of_the_cores(tmp_path: Path) -> None:
    with LauncherProcess(tmp_path, "succeed", "succeed") as launcher:
        assert launcher.end() == 0
    environ = launcher.worker_environ(1)
    assert int(environ["OMP_NUM_THREADS"]) >= 1
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    assert launcher.message().adapter is not None
    assert "asks for 1 worker processes and 2 run here" in launcher.stderr()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_the_workers_save_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    with LauncherProcess(tmp_path, "wait_for_stop", "wait_for_stop") as launcher:
        launcher.wait_ready(0, 1)
        os.kill(launcher.pid, number)
        assert launcher.end() == 143
    message = launcher.message()
    assert message.reason is Reason.TERMINATED
    assert message.checkpoint is not None
    assert message.checkpoint.step == 7


def test_a_second_signal_ends_the_attempt_at_once_with_its_workers(tmp_path: Path) -> None:
    with LauncherProcess(tmp_path, "ignore_stop", environ={"FINETUNE_GRACE_SECONDS": "3600"}) as launcher:
        launcher.wait_ready(0)
        worker = Path(f"/proc/{launcher.worker_pid(0)}")
        os.kill(launcher.pid, signal.SIGTERM)
        os.kill(launcher.pid, signal.SIGINT)
        assert launcher.end() == 143
        wait_until(lambda: not worker.exists(), "the worker's end")
    assert not list(tmp_path.glob("finetune-*")), "the launcher leaves no folder behind"
    message = launcher.message()
    assert (message.reason, message.checkpoint) == (Reason.TERMINATED, None)


def test_workers_that_outlast_their_grace_are_killed(tmp_path: Path) -> None:
    with LauncherProcess(tmp_path, "ignore_stop", environ={"FINETUNE_GRACE_SECONDS": "1"}) as launcher:
        launcher.wait_ready(0)
        worker = Path(f"/proc/{launcher.worker_pid(0)}")
        os.kill(launcher.pid, signal.SIGTERM)
        assert launcher.end() == 143
        wait_until(lambda: not worker.exists(), "the worker's end")
    assert "before it saved a checkpoint" in launcher.message().message


def test_a_killed_launcher_takes_its_workers_along(tmp_path: Path) -> None:
    with LauncherProcess(tmp_path, "ignore_stop") as launcher:
        launcher.wait_ready(0)
        worker = Path(f"/proc/{launcher.worker_pid(0)}")
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.end()
        wait_until(lambda: not worker.exists(), "the worker's end")


def test_a_signal_while_other_nodes_are_awaited_ends_the_launcher(tmp_path: Path) -> None:
    """Torch waits for the master in C++, where no Python handler runs."""
    with socket.create_server(("127.0.0.1", 0)) as silent_master:
        environ = {
            "PET_NNODES": "2",
            "PET_NODE_RANK": "1",
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(silent_master.getsockname()[1]),
        }
        with LauncherProcess(tmp_path, "succeed", environ=environ) as launcher:
            connection, _ = silent_master.accept()
            with connection:
                assert connection.recv(1), "torch speaks first and then waits for the answer"
                os.kill(launcher.pid, signal.SIGTERM)
                assert launcher.end() == 143
    assert launcher.message().reason is Reason.TERMINATED


def test_two_nodes_train_together_and_each_ends_with_its_own_view(tmp_path: Path) -> None:
    """Node 1 finds the data invalid; node 0 only loses its peer, and says that this is not the cause."""
    from finetune_trainer.launch.elastic import find_free_port

    common = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(find_free_port())}
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    script = {"FINETUNE_TEST_SCRIPT": '{"0": "lose_peer", "1": "fail_on_data"}', "FINETUNE_EXPECTED_WORLD_SIZE": "2"}
    with (
        LauncherProcess(tmp_path / "0", "-", environ={**common, **script, "PET_NODE_RANK": "0"}) as node_0,
        LauncherProcess(tmp_path / "1", "-", environ={**common, **script, "PET_NODE_RANK": "1"}) as node_1,
    ):
        assert node_1.end() == EXIT_CODES[Reason.DATA_INVALID], node_1.stderr()
        (tmp_path / "0" / "pid-1").write_text((tmp_path / "1" / "pid-1").read_text())
        assert node_0.end() == EXIT_CODES[Reason.PEER_FAILED], node_0.stderr()
    assert node_1.message().collateral is False
    assert node_0.message().collateral is True


def test_an_invalid_job_ends_before_anything_is_loaded(tmp_path: Path) -> None:
    with LauncherProcess(tmp_path, "succeed", job="model_id: m\nlearning_rat: 1\n") as launcher:
        assert launcher.end() == EXIT_CODES[Reason.INVALID_SPEC]
    assert "learning_rat" in launcher.message().message


def test_a_result_that_cannot_be_handed_over_is_no_success(tmp_path: Path) -> None:
    environ = {"FINETUNE_TERMINATION_MESSAGE_PATH": str(tmp_path / "missing" / "termination-log")}
    with LauncherProcess(tmp_path, "succeed", environ=environ) as launcher:
        assert launcher.end() == EXIT_CODES[Reason.INTERNAL_ERROR]
    assert "could not be written" in launcher.stderr()


def test_the_module_is_the_command(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    message_path = tmp_path / "termination-log"
    run = subprocess.run(
        [sys.executable, "-m", "finetune_trainer", str(tmp_path / "absent.yaml")],
        env={**environ, "FINETUNE_TERMINATION_MESSAGE_PATH": str(message_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == EXIT_CODES[Reason.INVALID_SPEC], run.stderr
    assert "absent.yaml" in run.stderr
    assert "Traceback" not in run.stderr
    message = TerminationMessage.parse(message_path.read_bytes())
    assert message is not None
    assert message.reason is Reason.INVALID_SPEC
