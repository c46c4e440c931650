"""Local folders and S3 keep the same promises: whole files, whole folders, and a manifest that comes last."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from finetune_api.outcome import Reason
from finetune_api.storage_uri import parse
from finetune_trainer.errors import JobError
from finetune_trainer.storage import ObjectStore, open_store, read_manifest, write_manifest
from finetune_trainer.storage.local_store import LocalStore, atomic_file
from finetune_trainer.storage.s3 import MIB, TRANSFER, connect
from finetune_trainer.storage.s3_store import S3Store
from tests.s3_server import S3Server


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of either kind."""
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("s3_environment")
    return open_store(f"s3://{server.new_bucket()}/team/run")


def folder_with(folder: Path, files: dict[str, bytes]) -> Path:
    """`folder` with `files` in it."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def test_bytes_come_back_as_they_were_written(store: ObjectStore) -> None:
    assert not store.exists("a/b.txt")
    store.write_bytes("a/b.txt", b"one")
    store.write_bytes("a/b.txt", b"two")
    store.write_bytes("a.txt", b"")
    assert store.exists("a/b.txt")
    assert not store.exists("a")
    assert store.read_bytes("a/b.txt") == b"two"
    assert store.read_bytes("a.txt") == b""
    assert store.list() == ["a.txt", "a/b.txt"]
    assert store.list("a") == ["a/b.txt"]
    assert store.list("nothing") == []
    store.delete("a/b.txt")
    store.delete("a/b.txt")
    assert store.list() == ["a.txt"]


def test_a_published_folder_comes_back_whole(store: ObjectStore, tmp_path: Path) -> None:
    files = {"weights.bin": os.urandom(3000), "sub/config.json": b"{}", "empty": b""}
    source = folder_with(tmp_path / "source", files)
    manifest = write_manifest(source, {"step": 10})
    store.upload_tree(source, "checkpoints/step-10")
    store.download_tree("checkpoints/step-10", tmp_path / "copy")
    assert {path: (tmp_path / "copy" / path).read_bytes() for path in files} == files
    assert read_manifest(store, "checkpoints/step-10") == manifest
    assert manifest.details == {"step": 10}
    assert manifest.size_bytes == 3002
    assert hashlib.sha256((tmp_path / "copy" / "manifest.json").read_bytes()).hexdigest() == manifest.sha256()


def test_the_manifest_is_uploaded_after_every_other_file(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_with(tmp_path / "source", {"a": b"1", "z/z": b"2", "manifest.json.bak": b"3"})
    write_manifest(source)
    order: list[str] = []
    upload = store.upload_file

    def recorded(file: Path, key: str) -> None:
        assert not store.exists("out/manifest.json")
        order.append(key)
        upload(file, key)

    monkeypatch.setattr(store, "upload_file", recorded)
    store.upload_tree(source, "out")
    assert order == ["out/a", "out/manifest.json.bak", "out/z/z", "out/manifest.json"]


def test_an_interrupted_second_upload_hides_the_first(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New files beside the old manifest would look whole and be a mixture."""
    first = folder_with(tmp_path / "first", {"a": b"old", "b": b"old"})
    write_manifest(first)
    store.upload_tree(first, "out")
    second = folder_with(tmp_path / "second", {"a": b"new", "b": b"new"})
    write_manifest(second)
    upload = store.upload_file

    def interrupted(file: Path, key: str) -> None:
        if key.endswith("/b"):
            raise KeyboardInterrupt
        upload(file, key)

    monkeypatch.setattr(store, "upload_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.upload_tree(second, "out")
    assert store.read_bytes("out/a") == b"new"
    assert read_manifest(store, "out") is None


@pytest.mark.parametrize("damage", ["changed", "shortened", "removed"])
def test_a_damaged_folder_is_refused_and_leaves_nothing(store: ObjectStore, tmp_path: Path, damage: str) -> None:
    source = folder_with(tmp_path / "source", {"weights": b"123456", "other": b"x"})
    write_manifest(source)
    store.upload_tree(source, "out")
    if damage == "removed":
        store.delete("out/weights")
    else:
        store.write_bytes("out/weights", b"123457" if damage == "changed" else b"123")
    with pytest.raises(JobError, match="weights") as failure:
        store.download_tree("out", tmp_path / "copy")
    assert failure.value.reason is Reason.STORAGE_NOT_FOUND
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "store") == ["source"]


def test_a_folder_that_is_not_there_is_not_published_as_an_empty_one(store: ObjectStore, tmp_path: Path) -> None:
    store.write_bytes("out/manifest.json", b"kept")
    with pytest.raises(JobError, match="is not a folder"):
        store.upload_tree(tmp_path / "none", "out")
    assert store.read_bytes("out/manifest.json") == b"kept"


def test_files_that_no_manifest_names_are_not_downloaded(store: ObjectStore, tmp_path: Path) -> None:
    source = folder_with(tmp_path / "source", {"new": b"1"})
    write_manifest(source)
    store.write_bytes("out/left-over", b"2")
    store.upload_tree(source, "out")
    store.download_tree("out", tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["manifest.json", "new"]


def test_a_folder_without_a_manifest_is_copied_as_it_is(store: ObjectStore, tmp_path: Path) -> None:
    store.write_bytes("model/config.json", b"{}")
    store.write_bytes("model/sub/a", b"1")
    store.write_bytes("model-2/b", b"2")
    store.download_tree("model", tmp_path / "copy")
    assert sorted(str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*")) == [
        "config.json",
        "sub",
        "sub/a",
    ]
    with pytest.raises(JobError, match="nothing at"):
        store.download_tree("mod", tmp_path / "none")


@pytest.mark.parametrize("path", ["../outside", "/etc/outside", "a/../../outside", ""])
def test_a_manifest_cannot_write_outside_its_folder(store: ObjectStore, tmp_path: Path, path: str) -> None:
    content = {"version": 1, "files": {path: {"sha256": "0" * 64, "sizeBytes": 1}}}
    store.write_bytes("out/manifest.json", json.dumps(content).encode())
    with pytest.raises(JobError, match=r"manifest\.json is not a manifest"):
        store.download_tree("out", tmp_path / "copy")


def test_deleting_a_folder_takes_the_manifest_first(store: ObjectStore, tmp_path: Path) -> None:
    source = folder_with(tmp_path / "source", {"a": b"1", "b/c": b"2"})
    write_manifest(source)
    store.upload_tree(source, "out")
    store.write_bytes("output/kept", b"3")
    store.delete_tree("out")
    store.delete_tree("out")
    assert store.list() == ["output/kept"]


@pytest.mark.parametrize(
    ("size", "transfer"),
    [
        pytest.param(20 * MIB, TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB), id="lowered"),
        pytest.param(40 * MIB + 1, TRANSFER, id="default"),
    ],
)
def test_files_above_the_multipart_size_survive_the_journey(
    s3_environment: S3Server, tmp_path: Path, size: int, transfer: TransferConfig
) -> None:
    bucket = s3_environment.new_bucket()
    connection = connect()
    headers: set[str] = set()
    connection.client.meta.events.register(
        "before-send.s3", lambda request, **others: headers.update(name.lower() for name in request.headers)
    )
    store = S3Store(parse(f"s3://{bucket}/big"), connection=connection, transfer=transfer)
    source = folder_with(tmp_path / "source", {"weights": os.urandom(size)})
    write_manifest(source)
    store.upload_tree(source, "")
    # An ETag of parts ends in their number: proof that this was a multipart upload.
    etag = s3_environment.client().head_object(Bucket=bucket, Key="big/weights")["ETag"]
    assert re.search(r"-\d+\"?$", etag)
    store.download_tree("", tmp_path / "copy")
    # Checksums that the protocol does not require are what servers other than AWS's reject.
    assert "authorization" in headers
    assert not [name for name in headers if "checksum" in name or name == "x-amz-trailer"]
    assert (tmp_path / "copy" / "weights").read_bytes() == (source / "weights").read_bytes()


KILLED_UPLOAD = """
import os, signal, sys
from pathlib import Path
from finetune_trainer.storage import open_store
store = open_store(sys.argv[1])
upload, done = store.upload_file, []
def killed(file, key):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(key)
    upload(file, key)
store.upload_file = killed
store.upload_tree(Path(sys.argv[2]), "out")
"""


def test_a_killed_upload_is_never_taken_for_a_whole_one(store: ObjectStore, tmp_path: Path) -> None:
    source = folder_with(tmp_path / "source", {name: os.urandom(100) for name in "abcd"})
    write_manifest(source)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_UPLOAD, store.uri, str(source)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -9
    assert store.list("out") == ["out/a", "out/b"]
    assert read_manifest(store, "out") is None
    store.upload_tree(source, "out")
    store.download_tree("out", tmp_path / "copy")


def test_a_local_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file"
    with atomic_file(target) as stream:
        stream.write(b"old")

    def half_written() -> None:
        with atomic_file(target) as stream:
            stream.write(b"new")
            stream.flush()
            assert LocalStore(tmp_path).list() == ["new folder/file"]
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        half_written()
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("prepare", "use", "reason", "said"),
    [
        (lambda f: None, lambda s: s.read_bytes("a"), Reason.STORAGE_NOT_FOUND, "There is no"),
        (lambda f: (f / "a").mkdir(), lambda s: s.read_bytes("a"), Reason.STORAGE_NOT_FOUND, "is a folder"),
        (lambda f: (f / "a").touch(), lambda s: s.write_bytes("a/b", b""), Reason.STORAGE_NOT_FOUND, "is not a folder"),
    ],
    ids=["missing", "folder", "file in the way"],
)
def test_local_refusals_are_sentences(
    tmp_path: Path,
    prepare: Callable[[Path], None],
    use: Callable[[ObjectStore], None],
    reason: Reason,
    said: str,
) -> None:
    prepare(tmp_path)
    with pytest.raises(JobError, match=said) as failure:
        use(open_store(str(tmp_path)))
    assert failure.value.reason is reason
    assert str(tmp_path) in failure.value.message


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1" * 100_000)
    with pytest.raises(JobError, match=r"disk is full \(.*free\)") as failure:
        LocalStore(tmp_path).download_file("weights", Path("/dev/full"))
    assert failure.value.reason is Reason.DISK_FULL
