"""The list of a published folder's files with their digests.

It is written last. A folder without it was never finished, a folder that differs from it was changed afterwards:
readers need no other sign that an upload is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

MANIFEST_NAME = "manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """Digest and size of one file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """Files of a folder by relative path (with "/"), and what its writer wanted to say about them."""

    files: dict[str, FileEntry]
    details: dict[str, Any] = field(default_factory=dict)
    """JSON values under keys of the writer's own, e.g. the step of a checkpoint."""

    @property
    def size_bytes(self) -> int:
        """Sum over the files."""
        return sum(entry.size_bytes for entry in self.files.values())

    def only(self, paths: Iterable[str]) -> Manifest:
        """The part of it that is about `paths`; those it does not list are left out."""
        return replace(self, files={path: self.files[path] for path in paths if path in self.files})

    def to_bytes(self) -> bytes:
        """JSON, the same bytes for the same content."""
        files = {
            path: {"sha256": entry.sha256, "sizeBytes": entry.size_bytes} for path, entry in sorted(self.files.items())
        }
        return json.dumps({"version": _VERSION, **self.details, "files": files}, indent=2).encode() + b"\n"

    def sha256(self) -> str:
        """Digest of the manifest itself, hence of everything it lists."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_manifest(data: bytes, uri: str) -> Manifest:
    """The manifest in `data`, which was read from `uri`.

    Raises:
        JobError: StorageNotFound when it is not a manifest that this version reads.
    """
    try:
        content = json.loads(data)
        version = content.pop("version")
        files = {
            _inside(path): FileEntry(sha256=str(entry["sha256"]), size_bytes=int(entry["sizeBytes"]))
            for path, entry in content.pop("files").items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _unreadable(uri) from error
    if version != _VERSION:
        raise _unreadable(uri)
    return Manifest(files, content)


def build_manifest(folder: Path, details: Mapping[str, Any] | None = None) -> Manifest:
    """Digest every file under `folder` but a manifest at its top.

    Raises:
        ValueError: `details` uses a key of the manifest itself.
        OSError: a file cannot be read.
    """
    details = dict(details or {})
    if reserved := details.keys() & {"version", "files"}:
        raise ValueError(f"the manifest's own keys cannot be details: {sorted(reserved)}")
    files = {path: FileEntry(*_digest(folder / path)) for path in tree_files(folder) if path != MANIFEST_NAME}
    return Manifest(files, details)


def write_manifest(folder: Path, details: Mapping[str, Any] | None = None) -> Manifest:
    """Digest `folder` and put its manifest beside the files, ready for `upload_tree`."""
    manifest = build_manifest(folder, details)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return manifest


def verify_tree(folder: Path, manifest: Manifest, uri: str) -> None:
    """Check that `folder`, a copy of `uri`, holds what `manifest` lists; files beyond that do not matter.

    Raises:
        JobError: StorageNotFound, names the first file that is missing or differs.
    """
    for path, what in _damaged(folder, manifest):
        raise _incomplete(uri, path, what)


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether `folder` holds what `manifest` lists."""
    return next(_damaged(folder, manifest), None) is None


def _damaged(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Files that are not as listed, and what is wrong with each."""
    for path, entry in manifest.files.items():
        file = folder / path
        if not file.is_file():
            yield path, "is missing"
        elif file.stat().st_size != entry.size_bytes or _digest(file)[0] != entry.sha256:
            yield path, "differs from its manifest"


def tree_files(folder: Path) -> list[str]:
    """Relative paths (with "/") of all files under `folder`, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _unreadable(uri: str) -> JobError:
    return JobError(
        Reason.STORAGE_NOT_FOUND, f"{uri} is not a manifest that this version reads: publish the folder again."
    )


def _incomplete(uri: str, path: str, what: str) -> JobError:
    return JobError(
        Reason.STORAGE_NOT_FOUND,
        f"{uri} is damaged, {path} {what}: remove the folder or publish it again from its source.",
    )


def _inside(path: str) -> str:
    """`path` when it stays in its folder: a manifest from a foreign bucket must not write elsewhere."""
    if not path or path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
        raise ValueError(f"unsafe path {path!r}")
    return path


def _digest(file: Path) -> tuple[str, int]:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), file.stat().st_size
