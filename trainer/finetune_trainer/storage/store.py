"""One small interface over a local folder and an S3 prefix, for checkpoints and adapters.

Whoever publishes says which file goes last; whoever reads looks for that file. So an interrupted upload is never
taken for a whole one, on any store.
"""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage.errors import local_error, local_errors
from finetune_trainer.storage.manifest import MANIFEST_NAME, Manifest, is_whole, parse_manifest, tree_files, verify_tree


class ObjectStore(Protocol):
    """Files under one address. Keys are relative to it and separated by "/"; "" is the address itself.

    Every method raises JobError: StorageNotFound, StorageAccessDenied, StorageUnavailable or DiskFull.
    """

    @property
    def uri(self) -> str:
        """The address, without a trailing slash."""

    def uri_of(self, key: str) -> str:
        """The address of `key`, for messages and results."""

    def list(self, prefix: str = "") -> Sequence[str]:
        """Keys of all files below the folder `prefix`, at any depth, sorted. Empty when there is none."""

    def exists(self, key: str) -> bool:
        """Whether there is a file `key`."""

    def read_bytes(self, key: str) -> bytes:
        """Content of `key`."""

    def write_bytes(self, key: str, data: bytes) -> None:
        """Create or replace `key`; readers see the old content or the new, never a part."""

    def upload_file(self, file: Path, key: str) -> None:
        """Create or replace `key` with the content of `file`; readers see the old content or the new."""

    def download_file(self, key: str, file: Path) -> None:
        """Write `key` to `file`, whose folder exists."""

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens when there is none."""

    def delete_tree(self, prefix: str) -> None:
        """Remove everything below the folder `prefix`, its manifest first, so that it never looks whole."""

    def upload_tree(self, folder: Path, prefix: str, *, last: str = MANIFEST_NAME) -> None:
        """Publish `folder` under `prefix`, with `last` (when it is there) after everything else.

        A `last` of an earlier publication is removed first. Files of that publication that the new one lacks stay,
        but no manifest names them.
        """

    def download_tree(self, prefix: str, folder: Path, *, paths: Sequence[str] | None = None) -> None:
        """Copy what is below `prefix` to `folder`, which must not exist or be empty; complete or not at all.

        With a manifest, its files are fetched and verified; without one, every file is. `paths`, relative to
        `prefix`, are then the only ones fetched.
        """


class TreeTransfer:
    """Whole folders in terms of single files, the same for every store."""

    def upload_tree(self: ObjectStore, folder: Path, prefix: str, *, last: str = MANIFEST_NAME) -> None:
        if not folder.is_dir():
            raise local_error(NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder)))
        self.delete(_join(prefix, last))
        for path in sorted(tree_files(folder), key=lambda path: (path == last, path)):
            self.upload_file(folder / path, _join(prefix, path))

    def download_tree(self: ObjectStore, prefix: str, folder: Path, *, paths: Sequence[str] | None = None) -> None:
        source = self.uri_of(prefix)
        manifest = read_manifest(self, prefix)
        if paths is None and manifest is not None:
            paths = list(manifest.files)
        elif paths is None:
            start = len(_join(prefix, ""))
            paths = [key[start:] for key in self.list(prefix)]
        if not paths:
            raise JobError(Reason.STORAGE_NOT_FOUND, f"There is nothing at {source}: correct the address.")
        with local_errors(folder):
            scratch = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
            scratch.mkdir(parents=True)
        try:
            for path in paths:
                with local_errors(folder):
                    (scratch / path).parent.mkdir(parents=True, exist_ok=True)
                self.download_file(_join(prefix, path), scratch / path)
                if manifest is not None and not is_whole(scratch, manifest.only([path])):
                    # A damaged copy of a whole file and a whole copy of a damaged one look the same, once.
                    self.download_file(_join(prefix, path), scratch / path)
            with local_errors(folder):
                if manifest is not None:
                    verify_tree(scratch, manifest.only(paths), source)
                    (scratch / MANIFEST_NAME).write_bytes(manifest.to_bytes())
                scratch.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def read_manifest(store: ObjectStore, prefix: str) -> Manifest | None:
    """The manifest of the folder `prefix`, or None when it has none: it was never finished.

    Raises:
        JobError: as ObjectStore's methods, and StorageNotFound when the file is no manifest.
    """
    key = _join(prefix, MANIFEST_NAME)
    return parse_manifest(store.read_bytes(key), store.uri_of(key)) if store.exists(key) else None


def _join(prefix: str, path: str) -> str:
    return f"{prefix.rstrip('/')}/{path}" if prefix else path
