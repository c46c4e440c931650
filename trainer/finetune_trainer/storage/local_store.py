"""A folder as a store: every file appears whole, by a rename, after its bytes are on the disk."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from finetune_trainer.storage.errors import local_errors
from finetune_trainer.storage.manifest import MANIFEST_NAME, tree_files
from finetune_trainer.storage.store import TreeTransfer

_TEMPORARY = ".partial-"
"""How names of files begin that are still being written; a killed process may leave one."""


class LocalStore(TreeTransfer):
    """ObjectStore over a local folder, which is created when something is written."""

    def __init__(self, folder: Path, *, uri: str | None = None) -> None:
        self.folder = folder
        self._uri = uri or str(folder)

    @property
    def uri(self) -> str:
        return self._uri

    def uri_of(self, key: str) -> str:
        return f"{self._uri.rstrip('/')}/{key}" if key else self._uri

    def list(self, prefix: str = "") -> Sequence[str]:
        base = self.folder / prefix
        with local_errors(base):
            paths = [path for path in tree_files(base) if not path.rpartition("/")[2].startswith(_TEMPORARY)]
        return [f"{prefix.rstrip('/')}/{path}" if prefix else path for path in paths]

    def exists(self, key: str) -> bool:
        with local_errors(self.folder / key):
            return (self.folder / key).is_file()

    def read_bytes(self, key: str) -> bytes:
        with local_errors(self.folder / key):
            return (self.folder / key).read_bytes()

    def write_bytes(self, key: str, data: bytes) -> None:
        with local_errors(self.folder / key), atomic_file(self.folder / key) as stream:
            stream.write(data)

    def upload_file(self, file: Path, key: str) -> None:
        with (
            local_errors(self.folder / key),
            file.open("rb") as source,
            atomic_file(self.folder / key) as stream,
        ):
            shutil.copyfileobj(source, stream, 1 << 20)

    def download_file(self, key: str, file: Path) -> None:
        with local_errors(file):
            shutil.copyfile(self.folder / key, file)

    def delete(self, key: str) -> None:
        with local_errors(self.folder / key):
            (self.folder / key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        folder = self.folder / prefix
        self.delete(f"{prefix}/{MANIFEST_NAME}" if prefix else MANIFEST_NAME)
        with local_errors(folder):
            if folder.is_dir():
                shutil.rmtree(folder)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes `target` when the block ends without an exception, and is dropped otherwise.

    Survives a power cut: data, then name, are flushed to the disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
