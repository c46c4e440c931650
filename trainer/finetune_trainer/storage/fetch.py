"""Brings a job's inputs to this machine: data files, models, tokenizers and adapters.

One process per node calls these; the others wait and read what it left in the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from finetune_api.outcome import Reason
from finetune_api.storage_uri import Scheme, StorageUri
from finetune_trainer.errors import JobError
from finetune_trainer.storage.addresses import local_path, parse_address
from finetune_trainer.storage.errors import human_bytes, local_errors, require_space
from finetune_trainer.storage.gguf import has_own_tokenizer, ordinary_folder, read_facts
from finetune_trainer.storage.hub import download_dataset_file, download_snapshot
from finetune_trainer.storage.model_files import (
    READ_WHOLE_BYTES,
    Select,
    adapter_files,
    gguf_file,
    model_files,
    tokenizer_files,
)
from finetune_trainer.storage.s3 import S3Connection, connect, read_with_fallback
from finetune_trainer.storage.s3_store import ObjectStat, S3Store, file_md5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchedModel:
    """A model, tokenizer or adapter folder on this machine."""

    path: Path
    resolved_revision: str | None
    """Commit on the Hub; None for folders and object stores, which have none."""
    warnings: tuple[str, ...] = ()
    """What the user should know of it, a sentence each."""


def default_cache_dir() -> Path:
    """FINETUNE_CACHE_DIR, or ~/.cache/finetune-operator."""
    return Path(os.environ.get("FINETUNE_CACHE_DIR") or "~/.cache/finetune-operator").expanduser()


def fetch_file(uri: str, cache_dir: Path | None = None) -> Path:
    """The data file at `uri` on this machine: a path (as it is), pvc://, s3:// or hf://datasets/owner/name/file.

    An object is fetched once per content (ETag and size) into `cache_dir` (default_cache_dir() when None); a Hub
    file goes to the Hub's own cache.

    Raises:
        JobError: InvalidSpec, StorageNotFound, StorageAccessDenied, StorageUnavailable, HubUnavailable or DiskFull.
    """
    address = parse_address(uri)
    match address.scheme:
        case Scheme.S3:
            return read_with_fallback(connect(), partial(_fetch_object, address, cache_dir or default_cache_dir()))
        case Scheme.HUB_DATASET:
            return download_dataset_file(address.container, address.revision, address.path)
        case _:
            path = local_path(address)
            with local_errors(path), path.open("rb"):
                return path


def fetch_model(
    model_id: str,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    key: str = "model_id",
    sleep: Callable[[float], None] = time.sleep,
) -> FetchedModel:
    """The model `model_id`, weights in one format only: a Hub name, a folder, pvc:// or s3://bucket/prefix.

    A GGUF file, alone in one of these or named at the end of the address, becomes an ordinary folder in `cache_dir`.

    Args:
        model_id: A name with a "/" is looked up as a folder first, then on the Hub, as transformers does.
        revision: Branch, tag or commit on the Hub.
        cache_dir: Where s3:// models go, default_cache_dir() when None. The Hub's go to the Hub's own cache.
        trust_remote_code: Fetch the repository's Python files as well.
        key: Key of the job that `model_id` was written in, for messages.
        sleep: Waits between tries at the Hub, for tests.

    Raises:
        JobError: ModelNotFound, ModelAccessDenied, ModelUnsupported, StorageNotFound, StorageAccessDenied,
            StorageUnavailable, HubUnavailable, DiskFull or InvalidSpec.
    """
    place, file = _split_gguf(model_id)
    select = partial(model_files, source=place, code=trust_remote_code, gguf=file)
    fetched = _fetch_folder(place, revision, select, "config.json", key, cache_dir, sleep)
    return _without_gguf(fetched, place, file, cache_dir, weights=True)


def fetch_tokenizer(
    model_id: str,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    code: bool = False,
    key: str = "model_id",
    sleep: Callable[[float], None] = time.sleep,
) -> FetchedModel:
    """As fetch_model, without weights: enough for AutoTokenizer, AutoConfig and the chat template.

    `code` fetches the repository's Python files as well, for a job that trusts them.
    """
    place, file = _split_gguf(model_id)
    select = partial(tokenizer_files, source=place, code=code, gguf=file)
    fetched = _fetch_folder(place, revision, select, "config.json", key, cache_dir, sleep)
    return _without_gguf(fetched, place, file, cache_dir, weights=False)


def fetch_adapter(
    address: str,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> FetchedModel:
    """The PEFT adapter at `address`, in the same places as models. Raises as fetch_model does."""
    select = partial(adapter_files, source=address)
    key = "initial_adapter_model_ckpt_path"
    return _fetch_folder(address, revision, select, "adapter_config.json", key, cache_dir, sleep)


def _fetch_folder(
    name: str,
    revision: str | None,
    select: Select,
    marker: str,
    key: str,
    cache_dir: Path | None,
    sleep: Callable[[float], None],
) -> FetchedModel:
    address = parse_address(name)
    if address.scheme is Scheme.S3:
        fetch = partial(_fetch_prefix, address, select, cache_dir or default_cache_dir())
        return FetchedModel(read_with_fallback(connect(), fetch), None)
    if address.scheme is Scheme.HUB_DATASET:
        raise JobError(Reason.INVALID_SPEC, f"{name} is a data set: write {key} as owner/name, a folder or s3://…")
    folder = local_path(address)
    if folder.is_dir():
        if not (folder / marker).is_file() and not (marker == "config.json" and any(folder.rglob("*.gguf"))):
            raise JobError(Reason.MODEL_NOT_FOUND, f"The folder {name} has no {marker}: correct {key}.")
        return FetchedModel(folder, None)
    if folder.exists():
        raise JobError(Reason.MODEL_NOT_FOUND, f"{name} is a file, a folder is needed: correct {key}.")
    if address.scheme is Scheme.PVC or "://" in name or name.startswith(("/", ".", "~")):
        raise JobError(Reason.MODEL_NOT_FOUND, f"There is no folder {name}: correct {key}.")
    snapshot = download_snapshot(name, revision, select, key=key, sleep=sleep)
    return FetchedModel(snapshot.path, snapshot.commit)


def _split_gguf(name: str) -> tuple[str, str | None]:
    """(the folder, prefix or Hub name, the GGUF file in it) where `name` ends in a file, else (`name`, None)."""
    if not name.endswith(".gguf"):
        return name, None
    address = parse_address(name)
    if address.scheme is Scheme.LOCAL and not name.startswith(("/", ".", "~", "file:")):
        path = Path(name)
        if not path.is_file():
            owner, _, rest = name.partition("/")
            repository, _, file = rest.partition("/")
            # A repository may have such a name too.
            return (f"{owner}/{repository}", file) if file else (name, None)
        return str(path.parent), path.name
    place, _, file = name.rpartition("/")
    return place or "/", file


def _without_gguf(
    fetched: FetchedModel, place: str, named: str | None, cache_dir: Path | None, *, weights: bool
) -> FetchedModel:
    """`fetched`, or an ordinary folder made of its GGUF file where its weights are in one."""
    folder = fetched.path
    paths = {path.name for path in folder.iterdir()} | {
        path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")
    }
    name = gguf_file(paths, source=place, named=named)
    if name is None:
        return fetched
    file, root = folder / name, (cache_dir or default_cache_dir()) / "gguf"
    facts = read_facts(file)
    with _lock(root / file.name, str(file)):
        made = ordinary_folder(file, root, weights=weights)
    warnings = facts.warnings(file.name, own_tokenizer=has_own_tokenizer(file))
    return FetchedModel(made, fetched.resolved_revision, tuple(warnings))


def _fetch_object(address: StorageUri, cache_dir: Path, connection: S3Connection) -> Path:
    if not address.path:
        raise JobError(Reason.STORAGE_NOT_FOUND, f"{address} names a bucket, not a file: add the file's key.")
    store = S3Store(address, connection=connection)
    stat = store.stat("")
    folder = cache_dir / "data" / _digest([str(address), stat.etag, stat.size_bytes])
    target = folder / address.path.rpartition("/")[2]
    with _lock(folder, str(address)):
        if not _is_intact(target, stat, store, ""):
            require_space(folder, stat.size_bytes, str(address))
            _log.info("Downloading %s: %s.", address, human_bytes(stat.size_bytes))
            scratch = folder.with_name(folder.name + ".partial")
            with local_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                store.download_file("", scratch)
                with local_errors(target):
                    scratch.replace(target)
            finally:
                scratch.unlink(missing_ok=True)
    return target


def _fetch_prefix(address: StorageUri, select: Select, cache_dir: Path, connection: S3Connection) -> Path:
    store = S3Store(address, connection=connection)
    stats = store.stat_tree("")
    if not stats:
        raise JobError(Reason.STORAGE_NOT_FOUND, f"There is nothing at {address}: correct the address.")
    wanted = {path: stats[path] for path in select(stats)}
    folder = cache_dir / "models" / _digest([str(address), *_rows(wanted)])
    with _lock(folder, str(address)):
        if not folder.exists():
            size = sum(stat.size_bytes for stat in wanted.values())
            require_space(folder, size, str(address))
            _log.info("Downloading %s: %d files, %s.", address, len(wanted), human_bytes(size))
            store.download_tree("", folder, paths=list(wanted))
        for path, stat in wanted.items():
            if not _is_intact(folder / path, stat, store, path):
                scratch = folder.with_name(folder.name + ".partial")
                try:
                    store.download_file(path, scratch)
                    with local_errors(folder):
                        scratch.replace(folder / path)
                finally:
                    scratch.unlink(missing_ok=True)
    return folder


def _is_intact(file: Path, stat: ObjectStat, store: S3Store, key: str) -> bool:
    """Whether a cached copy is there and still what was fetched; of a large one only the size is looked at."""
    with local_errors(file):
        if not file.is_file():
            return False
        if file.stat().st_size == stat.size_bytes:
            # A listing does not say which ETags are digests.
            if stat.md5 is None or stat.size_bytes > READ_WHOLE_BYTES or file_md5(file) == stat.md5:
                return True
            digest = store.stat(key).md5
            if digest is None:
                return True
    _log.warning("The copy of %s in the cache (%s) is damaged: it is fetched again.", store.uri_of(key), file)
    return False


def _rows(stats: dict[str, ObjectStat]) -> list[list[str | int]]:
    return [[path, stat.etag, stat.size_bytes] for path, stat in sorted(stats.items())]


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def _lock(target: Path, what: str) -> Iterator[None]:
    """Hold `target`'s lock: two jobs on one node may want the same object."""
    with local_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            # Without this line a wait on a shared volume looks like a hang.
            _log.info("Another process fetches %s: waiting for its lock %s.", what, lock.lock_file)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
