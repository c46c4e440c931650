"""Two attempts of a job are one run at its tracker, and a tracker that fails is told of once."""

from __future__ import annotations

import hashlib
import importlib
import io
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker  # type: ignore[import-untyped]

from finetune_api.training import Logger
from finetune_trainer.train import trackers as module
from finetune_trainer.train.console import Console
from finetune_trainer.train.tracker_runs import RUN_TAG, Opened, RunFacts, named, wandb_arguments
from finetune_trainer.train.tracker_settings import WandbConfig
from finetune_trainer.train.trackers import Trackers, open_trackers, run_key
from tests.trainer.run.tiny_job import TinyJob

KEY = "file:///out and what is trained"
CONFIG = {"learning_rate": 1e-4, "lora_config": {"r": 8}}


def run_attempts(
    folder: Path, provider: str, config: dict[str, Any], environ: dict[str, str]
) -> tuple[list[Path], str]:
    """Steps 1 to 4; then, from a checkpoint at step 2, steps 3 to 6. The files kept, and what was said."""
    stream, files = io.StringIO(), set()
    for resumed_at, steps in ((None, range(1, 5)), (2, range(3, 7))):
        trackers = open_trackers(
            Logger(provider=provider, provider_config=config),  # type: ignore[arg-type]
            run_name="guard",
            run_key=KEY,
            folder=folder,
            config=CONFIG | {"attempt": resumed_at},
            console=Console(stream),
            resumed_at_step=resumed_at,
            environ=environ,
        )
        for step in steps:
            trackers.log({"loss": step + (0.5 if resumed_at else 0)}, step)
        trackers.log({"eval_loss": 7.0}, steps[-1])
        trackers.finish(succeeded=resumed_at is not None, seconds=120)
        files |= set(trackers.files())
    return sorted(files), stream.getvalue()


def test_attempts_are_one_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The small package that the trainer comes with keeps runs in files or sends them to a server, no database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # Set by MLflow itself; monkeypatch puts back what was there.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    from mlflow import MlflowClient

    address = f"file://{tmp_path}/mlruns"
    config = {"tracking_uri": address, "experiment_name": "guards", "tags": {"team": "safety"}}
    client = MlflowClient(tracking_uri=address)
    _, said = run_attempts(tmp_path / "scratch", "mlflow", config, {})
    assert said == ""
    experiment = client.get_experiment_by_name("guards")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "guard"
    assert run.info.status == "FINISHED"
    assert run.data.tags["team"] == "safety"
    assert run.data.tags[RUN_TAG] == hashlib.sha256(KEY.encode()).hexdigest()
    assert run.data.params == {"learning_rate": "0.0001", "lora_config.r": "8", "attempt": "None"}
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(losses) == [(1, 1), (2, 2), (3, 3), (3, 3.5), (4, 4), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert run.data.metrics["eval_loss"] == 7


def test_attempts_are_one_curve_of_tensorboard(tmp_path: Path) -> None:
    files, said = run_attempts(tmp_path, "tensorboard", {}, {})
    assert said == ""
    assert [file.parent for file in files] == [tmp_path / "tensorboard"] * 2
    curves: dict[str, dict[int, float]] = {}
    for event in (event for file in files for event in tensorboard_events(file)):
        # As TensorBoard does: a start at a step hides what others wrote from there on.
        if event.HasField("session_log"):
            curves = {
                tag: {step: value for step, value in curve.items() if step < event.step}
                for tag, curve in curves.items()
            }
        for value in event.summary.value:
            if value.HasField("simple_value"):
                curves.setdefault(value.tag, {})[event.step] = value.simple_value
    assert curves == {"train/loss": {1: 1, 2: 2, 3: 3.5, 4: 4.5, 5: 5.5, 6: 6.5}, "eval/loss": {6: 7}}


def test_attempts_are_one_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"WANDB_MODE": "offline", "WANDB_ENTITY": "mine", "WANDB_SILENT": "true"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    config = {"project": "guards", "group": "night", "tags": ["a", "b"], "entity": "theirs", "config": {"gpu": "none"}}
    files, said = run_attempts(tmp_path, "wandb", config, environ)
    assert said == ""
    stores = [file for file in files if file.suffix == ".wandb"]
    assert len(stores) == 2
    seen: list[tuple[int, str]] = []
    for store in stores:
        records = list(wandb_records(store))
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert run.run_id == hashlib.sha256(KEY.encode()).hexdigest()[:16]
        assert (run.project, run.entity, run.run_group, run.display_name) == ("guards", "mine", "night", "guard")
        assert list(run.tags) == ["a", "b"]
        told = {item.key for record in records for item in record.config.update}
        assert {"learning_rate", "gpu"} <= told
        for record in records:
            values = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            if "train/loss" in values:
                seen.append((record.history.step.num, values["train/loss"]))
    losses = [(step, float(value)) for step, value in seen]
    assert sorted(losses) == [(1, 1), (2, 2), (3, 3), (3, 3.5), (4, 4), (4, 4.5), (5, 5.5), (6, 6.5)]


def test_wandb_is_asked_to_go_on_with_the_run_and_reads_what_the_environment_sets(tmp_path: Path) -> None:
    facts = RunFacts("guard", KEY, tmp_path, {}, None)
    found = wandb_arguments(WandbConfig(project="guards", notes="n"), facts, {"WANDB_PROJECT": "x", "WANDB_NAME": "y"})
    assert found["resume"] == "allow"
    assert (found["project"], found["name"], found["notes"], found["dir"]) == (None, None, "n", str(tmp_path))


@pytest.mark.parametrize(
    ("provider", "names"),
    [
        ("wandb", ["train/loss", "train/grad_norm", "eval/loss", "eval/token_accuracy"]),
        ("tensorboard", ["train/loss", "train/grad_norm", "eval/loss", "eval/token_accuracy"]),
        ("mlflow", ["loss", "grad_norm", "eval_loss", "eval_token_accuracy"]),
    ],
)
def test_figures_have_the_names_that_people_know_from_transformers(provider: str, names: list[str]) -> None:
    values = {"loss": 1.0, "grad_norm": 2.0, "eval_loss": 3.0, "eval_token_accuracy": 0.5}
    assert list(named(provider, values)) == names


def test_another_output_or_another_training_is_another_run() -> None:
    keys = {run_key("a", {"seed": 1}), run_key("b", {"seed": 1}), run_key("a", {"seed": 2})}
    assert len(keys) == 3
    assert run_key("a", {"x": 1, "y": 2}) == run_key("a", {"y": 2, "x": 1})


class Scripted(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """A tracker whose calls do what the test says."""

    name, requires_logging_directory, tracker = "scripted", False, None

    def __init__(self, on_log: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.on_log = on_log
        self.logged: list[int] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.on_log(step)
        self.logged.append(step)

    def finish(self) -> None:
        self.finished = True


def tracked(start: Callable[[], Opened], environ: dict[str, str] | None = None) -> tuple[Trackers, io.StringIO]:
    stream = io.StringIO()
    return Trackers("mlflow", start, console=Console(stream), environ=environ, retry_seconds=0.01), stream


def test_a_tracker_that_fails_is_told_of_once_and_without_secrets() -> None:
    def fail(step: int) -> None:
        if step < 3:
            raise ConnectionError("no route to https://me:pw@server, token abcdefgh12\nand a trace")

    tracker = Scripted(fail)
    trackers, stream = tracked(lambda: Opened(tracker, {}), {"MLFLOW_TRACKING_TOKEN": "abcdefgh12"})
    for step in range(1, 5):
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert tracker.logged == [3, 4]
    assert tracker.finished
    assert stream.getvalue() == (
        "warning: MLflow did not take metrics of this run (no route to https://***@server, token ***): training goes "
        "on, and metrics.jsonl at the output has all of them.\n"
    )


def test_a_tracker_that_answers_late_gets_all_of_the_run() -> None:
    tracker, failures = Scripted(), iter(range(3))

    def start() -> Opened:
        if next(failures, None) is not None:
            raise ConnectionError("refused")
        return Opened(tracker, {}, "https://server/run")

    trackers, stream = tracked(start)
    for step in range(1, 5):
        trackers.log({"loss": 1.0}, step)
    deadline = time.monotonic() + 30
    while len(tracker.logged) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    trackers.finish()
    assert tracker.logged == [1, 2, 3, 4]
    assert stream.getvalue().splitlines()[1:] == ["Metrics go to MLflow too: https://server/run"]


def test_a_tracker_that_never_answers_does_not_hold_the_end_of_a_run() -> None:
    def start() -> Opened:
        raise ConnectionError("refused")

    trackers, stream = tracked(start)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish(seconds=30)
    assert stream.getvalue().count("warning") == 1


def test_a_tracker_that_hangs_stalls_neither_a_step_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING", 5)
    release, stuck = threading.Event(), threading.Event()

    def hang(step: int) -> None:
        stuck.set()
        release.wait(60)

    tracker = Scripted(hang)
    trackers, stream = tracked(lambda: Opened(tracker, {}))
    began = time.monotonic()
    for step in range(1, 101):
        trackers.log({"loss": 1.0}, step)
    assert stuck.wait(30)
    trackers.finish(seconds=0.1)
    trackers.log({"loss": 1.0}, 101)
    trackers.finish()
    assert time.monotonic() - began < 30
    assert stream.getvalue().count("warning") == 1
    release.set()


def test_a_job_without_a_logger_has_no_tracker(tmp_path: Path) -> None:
    trackers = open_trackers(
        None, run_name="x", run_key="x", folder=tmp_path, config={}, console=Console(io.StringIO())
    )
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert trackers.files() == []


def test_a_job_leaves_its_losses_at_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    job = TinyJob(tmp_path, logger={"provider": "tensorboard"}, num_epochs=1)
    assert job.run().succeeded
    (file,) = (job.output / "tensorboard").iterdir()
    logged = {
        event.step: value.simple_value
        for event in tensorboard_events(file)
        for value in event.summary.value
        if value.tag == "train/loss"
    }
    assert logged == pytest.approx(job.losses())


def tensorboard_events(path: Path) -> Iterator[Any]:
    """The events in a file: length, checksum, event, checksum, and so on."""
    event = importlib.import_module("tensorboardX.proto.event_pb2").Event
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records in a file of an offline run, which is a log in LevelDB's format after a header of seven bytes."""
    record_type = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        # 1 is a whole record, 4 the last part of one.
        if kind in (1, 4):
            yield record_type.FromString(record)
            record = b""
