"""What exactly an address stood for: one short text per content, so that two attempts can tell whether it changed.

A commit says it for the Hub, the objects' ETags for S3. A folder has neither; of its files the small ones are read
whole and of the large ones samples, since reading every weight for this would take as long as loading them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from finetune_api.storage_uri import Scheme, StorageUri
from finetune_trainer.storage.addresses import local_path, parse_address
from finetune_trainer.storage.errors import local_errors
from finetune_trainer.storage.fetch import FetchedModel
from finetune_trainer.storage.model_files import READ_WHOLE_BYTES, tokenizer_files
from finetune_trainer.storage.s3 import S3Connection, connect, read_with_fallback
from finetune_trainer.storage.s3_store import S3Store

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_SAMPLE_BYTES, _SAMPLE_EVERY_BYTES = 4 << 10, 8 << 20
"""Every matrix of a large model is longer than the second, so one that changed is seen."""


@dataclass(frozen=True)
class Content:
    """What was found at an address."""

    address: str
    """As the job names it."""
    kind: str
    """What `value` is: commit, etags or files."""
    value: str
    """The Hub's commit, else a digest."""

    def __str__(self) -> str:
        return f"{self.address} with {self.kind} {self.value}"

    @property
    def commit(self) -> str | None:
        """The Hub's commit, where it has one."""
        return self.value if self.kind == "commit" else None

    def to_json(self) -> dict[str, str]:
        """As a manifest keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self | None:
        """What `to_json` made, or None when `value` is something else."""
        names = ("address", "kind", "value")
        if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in names):
            return None
        return cls(*(value[name] for name in names))


def content_of(address: str, fetched: FetchedModel) -> Content:
    """What is at `address`, from which `fetched` was: of a model its weights too, even if only its tokenizer was.

    Raises:
        JobError: as fetching does.
    """
    if fetched.resolved_revision is not None:
        return Content(address, "commit", fetched.resolved_revision)
    uri = parse_address(address)
    if uri.scheme is Scheme.S3:
        return Content(address, "etags", read_with_fallback(connect(), partial(_etags, uri)))
    # Not what was fetched: a GGUF file is fetched as a folder that was made of it.
    path = local_path(uri)
    with local_errors(path):
        return Content(address, "files", _files(path) if path.is_dir() else _digest([[path.name, *_sampled(path)]]))


def _etags(uri: StorageUri, connection: S3Connection) -> str:
    store = S3Store(uri, connection=connection)
    # Of a GGUF file the address is that of the object itself.
    stats = store.stat_tree("") or {uri.path.rpartition("/")[2]: store.stat("")}
    return _digest([[path, stats[path].etag, stats[path].size_bytes] for path in _relevant(stats)])


def _files(folder: Path) -> str:
    paths = _relevant(path.relative_to(folder).as_posix() for path in folder.glob("*") if path.is_file())
    return _digest([[path, *_sampled(folder / path)] for path in paths])


def _relevant(paths: Iterable[str]) -> list[str]:
    """Files at the top that belong to a model, its tokenizer or an adapter: what else lies there may change."""
    tops = [path for path in paths if "/" not in path]
    weights = {path for path in tops if path.endswith(_WEIGHTS)}
    return sorted({*tokenizer_files(set(tops) - weights, code=True), *weights})


def _sampled(file: Path) -> tuple[int, str]:
    """Size, and digest of the file or, where it is large, of samples of it."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        if size <= READ_WHOLE_BYTES:
            digest.update(stream.read())
        else:
            for start in (*range(0, size, _SAMPLE_EVERY_BYTES), size - _SAMPLE_BYTES):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return size, digest.hexdigest()


def _digest(parts: list[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
