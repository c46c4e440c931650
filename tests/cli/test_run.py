"""`finetune run` around the trainer: where results go, what is said, and how signals and the end get through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.outcome import AdapterResult, TerminationMessage
from finetune_cli.local_attempt import forwarded_signals, styled_line
from finetune_cli.run import placed, result_lines
from tests.cli.command import finetune


def _job(metadata: dict[str, Any] | None = None, **spec: Any) -> FineTuneJob:
    return FineTuneJob.model_validate(
        {
            "metadata": {"name": "guard", **(metadata or {})},
            "spec": {"model_id": "meta-llama/Meta-Llama-3-8B-Instruct", "train_path": "train.jsonl", **spec},
        }
    )


@pytest.mark.parametrize(
    ("spec", "output_dir", "expected"),
    [
        ({}, None, "{cwd}/finetune-output/guard"),
        ({}, "out", "{cwd}/out"),
        ({}, "/data/out", "/data/out"),
        ({"output": {"uri": "s3://models/guard"}}, None, "s3://models/guard"),
        ({"output_dir": "/data/out"}, None, "/data/out"),
        ({"output": {"uri": "s3://models/guard"}}, "out", "{cwd}/out"),
        ({}, "s3://models/guard", "s3://models/guard"),
    ],
)
def test_results_go_where_the_command_or_else_the_job_says(
    spec: dict[str, Any], output_dir: str | None, expected: str
) -> None:
    output = placed(_job(**spec), output_dir).spec.output
    assert output is not None
    assert output.uri == expected.format(cwd=Path.cwd())


def test_a_manifest_from_a_cluster_does_not_nest_its_output() -> None:
    assert placed(_job({"uid": "8d2f7c1e-0000"}), None).metadata.uid is None


def _succeeded(uri: str) -> TerminationMessage:
    adapter = AdapterResult(uri=uri, base_model="acme/model", sha256="0" * 64, size_bytes=1)
    return TerminationMessage(succeeded=True, adapter=adapter)


@pytest.mark.parametrize(
    ("uri", "weights", "command"),
    [
        ("/out/adapter", None, "finetune chat /out/adapter"),
        ("/my out/adapter", None, "finetune chat '/my out/adapter'"),
        ("/out/adapter", "/models/base", "finetune chat /out/adapter --base-model /models/base"),
        ("s3://models/guard/adapter", None, None),
    ],
)
def test_success_says_where_everything_is_and_how_to_try_it(uri: str, weights: str | None, command: str | None) -> None:
    lines = dict(result_lines(_job(initial_base_model_ckpt_path=weights), _succeeded(uri)))
    assert lines["Adapter"] == uri
    assert lines["Report"] == uri.removesuffix("adapter") + "report.html"
    assert lines.get("Try it") == command


@pytest.mark.parametrize(
    ("line", "style"),
    [
        ("warning: seed: no seed", "yellow"),
        ("DataInvalid: train.jsonl: line 3 is not JSON.", "bold red"),
        ("Training 2,442,240 LoRA parameters", ""),
    ],
)
def test_warnings_and_last_words_stand_out(line: str, style: str) -> None:
    assert styled_line(line).style == style
    assert styled_line(line).plain == line


def test_a_result_below_the_working_directory_is_named_from_there() -> None:
    lines = dict(result_lines(_job(), _succeeded(str(Path.cwd() / "finetune-output/guard/adapter"))))
    assert lines["Try it"] == "finetune chat finetune-output/guard/adapter"


def test_an_invalid_job_ends_before_anything_starts(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model_id: acme/model\ntrain_path: train.jsonl\n")
    result = finetune("run", str(job), "--set", "learning_rate=-1")
    assert result.exit_code == 1
    assert "learning_rate" in result.stderr


def test_the_trainers_exit_code_and_sentence_are_those_of_the_command(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model_id: meta-llama/Meta-Llama-3-8B-Instruct\ntrain_path: none.jsonl\n")
    # A process of its own, because the trainer writes to the real standard error.
    command = [sys.executable, "-m", "finetune_cli", "run", str(job), "--output-dir", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 19, ended.stderr
    assert "StorageNotFound: " in ended.stderr
    assert "none.jsonl" in ended.stderr
    assert not (tmp_path / "out" / "job.yaml").exists()


_ECHO_SIGNAL = """
import signal, sys
def end(number, frame): sys.exit(number)
signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, end)
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_goes_to_the_trainer_and_not_to_us(signum: signal.Signals) -> None:
    noticed: list[str] = []
    with forwarded_signals(lambda: noticed.append("stopping")) as started:
        child = started(
            subprocess.Popen([sys.executable, "-c", _ECHO_SIGNAL], stdout=subprocess.PIPE, text=True, process_group=0)
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            signal.raise_signal(signum)
            assert child.wait() == signum
    assert noticed == ["stopping"]


def test_a_stop_signal_before_the_start_reaches_the_trainer_too() -> None:
    with forwarded_signals(lambda: None) as started:
        signal.raise_signal(signal.SIGTERM)
        command = [sys.executable, "-c", "import signal; signal.pause()"]
        child = started(subprocess.Popen(command, text=True, process_group=0))
        assert child.wait() == -signal.SIGTERM


_ATTACHED = (
    "import os; from finetune_cli.attached import end_with; parent = os.getppid(); print('up', flush=True); "
    "end_with(parent)"
)
_PARENT = """
import subprocess, sys, signal
subprocess.Popen([sys.executable, "-c", sys.argv[1]], process_group=0)
signal.pause()
"""


def test_a_killed_command_leaves_no_trainer_behind() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as output:
        parent = subprocess.Popen([sys.executable, "-c", _PARENT, _ATTACHED], stdout=writing)
        os.close(writing)
        assert output.readline() == "up\n"
        parent.kill()
        parent.wait()
        # The pipe ends when the last process that holds it has ended.
        assert output.read() == ""
