"""What the Hub's cache on this machine already holds, whoever filled it.

`snapshot_download` of recent huggingface_hub versions keeps a listing of each commit beside its files; others, and
`from_pretrained`, keep none. Then the snapshot's own files are the listing, and what they refer to must be among them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import RepoFile, constants
from huggingface_hub import errors as hub
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling

from finetune_trainer.errors import JobError
from finetune_trainer.storage.model_files import INDEX, READ_WHOLE_BYTES, WEIGHTS, Select, is_vocabulary

_COMMIT = re.compile(r"[0-9a-f]{40}")
_READ = {
    "adapter_config.json", "added_tokens.json", "chat_template.json", "config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
_NAMED = 3
"""Missing files that a sentence names."""


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository."""

    path: Path
    commit: str


@dataclass(frozen=True)
class Lack:
    """Why the cache does not do."""

    what: str
    """Completes "team/model is ": "not in the cache", "in the cache without model.safetensors"."""
    partly: bool
    """Whether there is anything of it at all."""


def cached_snapshot(
    repo_id: str, revision: str | None, select: Select, cache_dir: Path | None, *, complete: bool
) -> Snapshot | Lack:
    """The cached commit of `revision` if every file that `select` picks is there, else what is missing.

    Args:
        repo_id: owner/name of a model.
        revision: branch, tag or commit; None is the main branch.
        select: picks the needed files among a repository's.
        cache_dir: folder of the cache, huggingface_hub's own when None.
        complete: accept only what a listing proves to be complete; otherwise transformers' own measure will do, which
            fetches no more than it reads.
    """
    absent = Lack("not in the cache", partly=False)
    try:
        folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / repo_folder_name(
            repo_id=repo_id, repo_type="model"
        )
    except hub.HFValidationError:
        return absent
    commit = _commit(folder, revision or constants.DEFAULT_REVISION)
    if commit is None:
        return _other_commits(folder, revision) or absent
    snapshot = Snapshot(folder / "snapshots" / commit, commit)
    # A link whose blob is gone is no file.
    present = {path.relative_to(snapshot.path).as_posix() for path in snapshot.path.rglob("*") if path.is_file()}
    if not present:
        return absent
    try:
        tree = huggingface_hub.get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)
        damaged = {file.path for file in tree if is_damaged(snapshot.path / file.path, file, whole=complete)}
        present -= damaged
        wanted = set(select(file.path for file in tree))
        spare = set() if complete else _unread(wanted, present)
        missing = sorted(wanted - spare - present)
    except hub.CachedRepoTreeNotFoundError:
        if complete:
            return absent
        missing = _missing(snapshot.path, present, select)
    return Lack(f"in the cache without {_some(missing)}", partly=True) if missing else snapshot


def is_damaged(file: Path, described: RepoFile | RepoSibling, *, whole: bool = True) -> bool:
    """Whether `file` is there and not what the Hub says of it.

    Args:
        file: in the cache.
        described: its size and digest, either of which may be unknown.
        whole: read it, unless it is large; else its size alone is compared.
    """
    if not file.is_file():
        return False
    size = file.stat().st_size
    if described.size is not None and size != described.size:
        return True
    if not whole or size > READ_WHOLE_BYTES:
        return False
    data = file.read_bytes()
    if described.lfs is not None:
        return hashlib.sha256(data).hexdigest() != described.lfs.sha256
    blob = hashlib.sha1(b"blob %d\0" % size + data, usedforsecurity=False).hexdigest()
    return described.blob_id is not None and blob != described.blob_id


def _commit(folder: Path, revision: str) -> str | None:
    if _COMMIT.fullmatch(revision):
        return revision
    ref = folder / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else None


def _other_commits(folder: Path, revision: str | None) -> Lack | None:
    """A download by commit leaves no branch behind."""
    commits = sorted(path.name for path in (folder / "snapshots").glob("*"))
    if not commits:
        return None
    asked = revision or constants.DEFAULT_REVISION
    return Lack(f"in the cache, but not at revision {asked!r}, only at commit {_some(commits)}", partly=True)


def _unread(wanted: set[str], present: set[str]) -> set[str]:
    """What `from_pretrained` leaves out: descriptions of other things, and vocabularies beside a tokenizer.json."""
    weights = any(path.endswith(WEIGHTS) for path in wanted)
    read = {*_READ, "generation_config.json"} if weights else _READ
    vocabularies = {path for path in wanted if is_vocabulary(path)}
    others = {path for path in wanted if path.endswith(".json") and path not in read and not INDEX.fullmatch(path)}
    return (others - vocabularies) | (vocabularies if "tokenizer.json" in present else set())


def _missing(snapshot: Path, present: set[str], select: Select) -> list[str]:
    """Files that those which are there refer to, and what nothing works without."""
    try:
        wanted = select(present)
    except JobError:
        return ["its weights"]
    if "adapter_config.json" in wanted:
        return []
    weights = [path for path in wanted if path.endswith(WEIGHTS)]
    missing = [] if "config.json" in wanted or any(path.endswith(".gguf") for path in weights) else ["config.json"]
    if not weights and not any(path.startswith("tokenizer") or is_vocabulary(path) for path in wanted):
        missing.append("its tokenizer")
    for path in filter(INDEX.fullmatch, wanted):
        shards = set(json.loads((snapshot / path).read_bytes()).get("weight_map", {}).values())
        # Whoever wants a tokenizer reads the list and needs none of them.
        missing += sorted(shards & set(select(present | shards)) - present)
    return missing


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
