"""Whatever a network or a server does to S3, a call ends: right, or with a sentence, and never with half an object.

FAULTS=all plays every fault to every call, once and for ever; otherwise some pairs stand for all.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from finetune_api.outcome import Reason
from finetune_api.storage_uri import parse
from finetune_trainer.errors import JobError
from finetune_trainer.storage import fetch_file, read_manifest, write_manifest
from finetune_trainer.storage.s3 import MIB, connect
from finetune_trainer.storage.s3_store import S3Store
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.checkpoint_files import ADAPTER
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
from tests.s3_server import S3Server
from tests.trainer.checkpoints import save_checkpoint
from tests.trainer.storage.s3_faults import Fault, Request, S3Faults, run_s3_faults

ALL_FAULTS = os.environ.get("FAULTS") == "all"
CONTENT = bytes(range(256)) * 40
BIG = os.urandom(5 * MIB + 1)
LONGEST_SECONDS = 60.0
"""Six tries of a second each, and the waits between them."""


@dataclass
class Place:
    """A store behind the proxy, with a folder published in it, and the same store without."""

    store: S3Store
    behind: S3Store
    faults: S3Faults
    folder: Path
    copies: Iterator[int] = field(default_factory=itertools.count)

    def new(self) -> Path:
        """A path that does not exist."""
        return self.folder / f"copy-{next(self.copies)}"


def download_file(place: Place) -> None:
    target = place.new()
    place.store.download_file("tree/weights", target)
    assert target.read_bytes() == CONTENT


def fetch(place: Place) -> None:
    assert fetch_file(place.store.uri_of("tree/weights"), place.new()).read_bytes() == CONTENT


def upload_file(place: Place) -> None:
    try:
        place.store.upload_file(place.folder / "source" / "weights", "alone")
    finally:
        assert not place.behind.exists("alone") or place.behind.read_bytes("alone") == CONTENT
    assert place.behind.exists("alone")


def upload_big(place: Place) -> None:
    (place.folder / "big").write_bytes(BIG)
    try:
        place.store.upload_file(place.folder / "big", "big")
    finally:
        assert not place.behind.exists("big") or place.behind.read_bytes("big") == BIG
    assert place.behind.exists("big")


def download_tree(place: Place) -> None:
    copy = place.new()
    try:
        place.store.download_tree("tree", copy)
    except JobError:
        assert not copy.exists()
        raise
    assert (copy / "weights").read_bytes() == CONTENT


def upload_tree(place: Place) -> None:
    try:
        place.store.upload_tree(place.folder / "source", "new")
    except JobError:
        assert read_manifest(place.behind, "new") is None
        raise
    place.behind.download_tree("new", place.new())


def list_keys(place: Place) -> None:
    assert place.store.list("tree") == ["tree/manifest.json", "tree/weights"]


def manifest(place: Place) -> None:
    found = read_manifest(place.store, "tree")
    assert found is not None
    assert found.details == {"step": 1}


CALLS: tuple[Callable[[Place], None], ...] = (
    download_file, fetch, upload_file, upload_big, download_tree, upload_tree, list_keys, manifest,
)  # fmt: skip
READS = {download_file, fetch, download_tree, list_keys, manifest}
SAMPLE = {
    (download_tree, Fault.CHANGED_ANSWER, 1),
    (fetch, Fault.CHANGED_ANSWER, 1),
    (manifest, Fault.CUT, 1),
    (upload_big, Fault.LOST_ANSWER, 1),
    (upload_tree, Fault.CHANGED_REQUEST, None),
    (list_keys, Fault.SLOW_DOWN, 1),
    (download_file, Fault.STALL, 1),
}
UNSEEN = {(list_keys, Fault.CHANGED_ANSWER)}
"""Nothing says what the bytes should have been: TLS does, where it is used."""
EMPTY = set(itertools.product((upload_file, upload_tree), (Fault.STALL, Fault.CUT, Fault.CHANGED_ANSWER)))
"""The answer has no content that this could befall."""


HARMLESS = {(upload_big, Fault.CHANGED_ANSWER)}
"""What is changed in these answers need not matter."""


def cases() -> list[tuple[Callable[[Place], None], Fault, int | None]]:
    """Every call, what befalls it, and how often; None is for ever."""
    every = [
        (call, fault, count)
        for call, fault, count in itertools.product(CALLS, Fault, (1, None))
        if (call, fault) not in UNSEEN | EMPTY and (fault is not Fault.CHANGED_REQUEST or call not in READS)
    ]
    return [case for case in every if ALL_FAULTS or case in SAMPLE]


@pytest.fixture
def place(s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A published folder, and a client that loses patience soon."""
    monkeypatch.setattr("finetune_trainer.storage.s3.READ_TIMEOUT_SECONDS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    address = parse(f"s3://{s3_environment.new_bucket()}/team")
    behind = S3Store(address)
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(CONTENT)
    write_manifest(source, {"step": 1})
    behind.upload_tree(source, "tree")
    transfer = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB)
    with run_s3_faults(s3_environment.endpoint) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", faults.endpoint)
        store = S3Store(address, connection=connect(read_timeout_seconds=1, attempts=3), transfer=transfer)
        yield Place(store, behind, faults, tmp_path)


def about_content(request: Request) -> bool:
    """Whether a request carries or asks for content; others are answered, so that the fault strikes there."""
    return request.method != "HEAD"


@pytest.mark.parametrize(
    ("call", "fault", "count"),
    cases(),
    ids=lambda value: value.value if isinstance(value, Fault) else getattr(value, "__name__", {1: "once"}.get(value)),
)
def test_a_call_ends_right_or_with_a_sentence(
    place: Place, call: Callable[[Place], None], fault: Fault, count: int | None
) -> None:
    place.faults.times(fault, count, about_content)
    began, failure = time.monotonic(), None
    try:
        call(place)
    except JobError as error:
        failure = error
    # Once is not enough to give up.
    assert (failure is None) == (count == 1) or (count is None and (call, fault) in HARMLESS), failure
    if failure is not None:
        assert failure.exit_code >= 128, failure
        assert re.fullmatch(r"[^\n]+\.", failure.message)
    assert place.faults.befallen() > 0
    assert time.monotonic() - began < LONGEST_SECONDS
    assert not [path for path in place.folder.rglob("*") if ".partial" in path.name]


def test_a_good_checkpoint_is_not_given_up_for_a_bad_copy_of_it(place: Place) -> None:
    checkpoints = Checkpoints(place.store, {}, keep=1)
    warnings: list[str] = []
    for step in (1, 2):
        save_checkpoint(checkpoints, place.new(), step)
    place.faults.times(
        Fault.CHANGED_ANSWER, 1, lambda request: request.method == "GET" and request.path.endswith(ADAPTER)
    )
    found = checkpoints.newest(place.new(), warnings.append)
    assert place.faults.befallen() == 1
    assert found is not None
    assert (found.step, warnings) == (2, [])


def test_an_outage_costs_no_training_and_no_checkpoint(place: Place) -> None:
    checkpoints = Checkpoints(place.store, {}, keep=5)
    warnings: list[str] = []
    place.faults.times(Fault.ERROR, None)
    with CheckpointWriter(checkpoints, warnings.append, pause_seconds=lambda _: 0.05) as writer:
        for step in (1, 2):
            folder = place.new()
            folder.mkdir()
            (folder / ADAPTER).write_bytes(b"%d" % step)
            writer.save(folder, step=step, eval_loss=None, details={})
        with pytest.raises(JobError, match="answered InternalError") as caught:
            writer.flush(1.0)
        assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
        writer.check()
        place.faults.rule = lambda _: None
        writer.flush(LONGEST_SECONDS)
    assert writer.last == checkpoints.result(2)
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [1, 2]
    assert len(warnings) == 2


EXIT = """
import sys, time
from pathlib import Path
from finetune_trainer.storage import open_store
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
from finetune_trainer.train.state import random_state
writer = CheckpointWriter(Checkpoints(open_store(sys.argv[1]), {}, 1), print)
writer.save(Path(sys.argv[2]), step=1, eval_loss=None, details={})
time.sleep(2)
print(time.clock_gettime(time.CLOCK_MONOTONIC))
"""


def test_a_store_that_is_silent_does_not_hold_up_the_end_of_the_process(place: Place) -> None:
    place.faults.times(Fault.SILENT, None, lambda request: request.method == "PUT")
    done = subprocess.run(
        [sys.executable, "-c", EXIT, place.store.uri, str(place.folder / "source")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert time.monotonic() - float(done.stdout) < 20
    assert place.faults.befallen() > 0
