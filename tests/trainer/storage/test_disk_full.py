"""A full disk is said to be full, and what was complete before stays complete."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage import fetch_file, open_store, write_manifest
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
from tests.s3_server import S3Server

SIZE_BYTES = 1 << 20
PATIENCE_SECONDS = 30.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def made(folder: Path, size_bytes: int) -> Path:
    """A folder with so many bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(size_bytes))
    return folder


def full(error: JobError) -> bool:
    """Whether the sentence is the right one."""
    return error.reason is Reason.DISK_FULL and "full" in error.message and error.exit_code < 128


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(LocalStore(small_disk / "out"), {}, keep=2)
    writer = CheckpointWriter(checkpoints, lambda _: None)
    for step in (1, 2):
        writer.save(made(tmp_path / f"made-{step}", SIZE_BYTES * 6 // 10), step=step, eval_loss=None, details={})
    with pytest.raises(JobError) as caught:
        writer.flush(PATIENCE_SECONDS)
    assert full(caught.value)
    writer.close()
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [1]
    assert writer.last == checkpoints.result(1)
    assert not list(small_disk.rglob(".partial-*"))


def test_a_checkpoint_that_cannot_be_sealed_says_why(small_disk: Path, tmp_path: Path) -> None:
    folder = made(small_disk / "made", SIZE_BYTES // 2)
    with contextlib.suppress(OSError), (small_disk / "rest").open("wb", buffering=0) as rest:
        while rest.write(bytes(4096)):
            pass
    checkpoints = Checkpoints(LocalStore(tmp_path / "out"), {}, keep=2)
    with pytest.raises(JobError) as caught:
        checkpoints.seal(folder, step=1, eval_loss=None, details={"a": "b" * 5000})
    assert full(caught.value)
    assert checkpoints.all() == []


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # boto3 lets go of an answer half read
def test_what_is_fetched_to_a_full_disk_is_not_there(
    small_disk: Path, tmp_path: Path, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"s3://{s3_environment.new_bucket()}/team")
    source = made(tmp_path / "source", 2 * SIZE_BYTES)
    write_manifest(source)
    store.upload_tree(source, "tree")
    with pytest.raises(JobError) as caught:
        store.download_tree("tree", small_disk / "copy")
    assert full(caught.value)
    with pytest.raises(JobError) as caught:
        fetch_file(store.uri_of("tree/adapter_model.safetensors"), small_disk)
    assert caught.value.reason is Reason.DISK_FULL
    # Somebody else takes the space after it was looked at.
    monkeypatch.setattr("finetune_trainer.storage.fetch.require_space", lambda *_: None)
    with pytest.raises(JobError) as caught:
        fetch_file(store.uri_of("tree/adapter_model.safetensors"), small_disk)
    assert full(caught.value)
    assert [path.name for path in small_disk.rglob("*") if path.is_file() and path.stat().st_size] == []
    del caught
    gc.collect()  # while the warning is ignored
