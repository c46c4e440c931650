"""A model repository of the Hub as a store.

The adapter belongs at the top of the branch that people load, since PEFT, vLLM and the Hub look there, and appears
there in one commit, its manifest with it. Until then it waits, with checkpoints and logs, on a branch of the job's own.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub import errors as hub
from tenacity import Retrying, retry_if_exception, stop_after_attempt

from finetune_api.outcome import Reason
from finetune_api.storage_uri import StorageUri
from finetune_trainer.errors import JobError
from finetune_trainer.storage.errors import local_error, local_errors, safe_address
from finetune_trainer.storage.hub import (
    ATTEMPTS,
    DEFAULT_ENDPOINT,
    TIMEOUT_SECONDS,
    TOKEN_HELP,
    endpoint,
    is_transient,
    say_wait,
    seconds_to_wait,
)
from finetune_trainer.storage.manifest import MANIFEST_NAME, parse_manifest, tree_files
from finetune_trainer.storage.store import TreeTransfer, read_manifest

ADAPTER, MERGED = "adapter", "merged"
"""Folders of a job's output that go to the branch that people load; the adapter's files to its top."""
_MODEL_FILES = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "model.safetensors"}
_CHANGED = {409, 412}


class HubStore(TreeTransfer):
    """ObjectStore over a model repository, which is made, private, where there is none. Every write is a commit.

    Args:
        address: hf://owner/name[@branch].
        work: the job's own branch.
        sleep: waits between tries, for tests.
    """

    def __init__(self, address: StorageUri, *, work: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self._address = address
        self._repo = address.container
        self._main = address.revision or "main"
        self._work = work
        self._api = huggingface_hub.HfApi(endpoint=endpoint())
        self._sleep = sleep
        self._ready = False
        self._waiting: Path | None = None
        """The adapter's folder on this machine between its upload to the job's branch and its publication."""

    @property
    def uri(self) -> str:
        return str(self._address)

    def uri_of(self, key: str) -> str:
        if key == ADAPTER or key.startswith(f"{ADAPTER}/"):
            return f"{self.uri}{key.removeprefix(ADAPTER)}"
        if key == MERGED or key.startswith(f"{MERGED}/"):
            return f"{self.uri}/{key}"
        return f"hf://{self._repo}@{self._work}/{key}".rstrip("/")

    def list(self, prefix: str = "") -> Sequence[str]:
        revision, place = self._place(prefix)

        def paths() -> list[str]:
            tree = self._api.list_repo_tree(self._repo, place or None, recursive=True, revision=revision)
            return [item.path for item in tree if isinstance(item, huggingface_hub.RepoFile)]

        found: list[str] = self._read(paths, prefix, absent=[])
        if not self._is_on_top(prefix):
            return sorted(found)
        return sorted(f"{ADAPTER}/{path}" for path in found if not path.startswith((f"{MERGED}/", ".git")))

    def exists(self, key: str) -> bool:
        revision, path = self._place(key)
        there: bool = self._read(lambda: self._api.file_exists(self._repo, path, revision=revision), key, absent=False)
        return there

    def read_bytes(self, key: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="finetune-hub-") as scratch:
            file = Path(scratch) / "file"
            self.download_file(key, file)
            return file.read_bytes()

    def write_bytes(self, key: str, data: bytes) -> None:
        if key == f"{ADAPTER}/{MANIFEST_NAME}":
            self._publish(data)
            return
        self._commit(key, f"Write {key}", lambda path: [CommitOperationAdd(path, data)])

    def upload_file(self, file: Path, key: str) -> None:
        with local_errors(file), file.open("rb"):
            pass
        self._commit(key, f"Write {key}", lambda path: [CommitOperationAdd(path, file)])

    def download_file(self, key: str, file: Path) -> None:
        revision, path = self._place(key)
        with local_errors(file):
            scratch = Path(tempfile.mkdtemp(prefix=".hub-", dir=file.parent))
        try:
            fetched = self._read(
                lambda: self._api.hf_hub_download(
                    self._repo, path, revision=revision, local_dir=scratch, etag_timeout=TIMEOUT_SECONDS
                ),
                key,
            )
            with local_errors(file):
                Path(fetched).replace(file)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def delete(self, key: str) -> None:
        if self.exists(key):
            self._commit(key, f"Remove {key}", lambda path: [CommitOperationDelete(path, is_folder=False)])

    def delete_tree(self, prefix: str) -> None:
        if prefix == ADAPTER and self._is_on_top(ADAPTER):
            # What else is in the repository is not the adapter's.
            manifest = read_manifest(self, ADAPTER)
            paths = [MANIFEST_NAME, *manifest.files] if manifest is not None else []
            if paths:
                self._commit(prefix, "Remove the adapter", lambda _: [CommitOperationDelete(path) for path in paths])
        elif self.list(prefix):
            self._commit(prefix, f"Remove {prefix}", lambda path: [CommitOperationDelete(f"{path}/", is_folder=True)])
        if prefix == ADAPTER:
            self._waiting = None

    def upload_tree(self, folder: Path, prefix: str, *, last: str = MANIFEST_NAME) -> None:  # noqa: ARG002
        """In one commit, so that `last` is there with everything else."""
        if not folder.is_dir():
            raise local_error(NotADirectoryError(20, "not a folder", str(folder)))
        if prefix == ADAPTER:
            self._waiting = folder
        files = tree_files(folder)
        self._commit(
            prefix,
            f"Write {prefix}",
            lambda path: [CommitOperationAdd(f"{path}/{file}".lstrip("/"), folder / file) for file in files],
        )

    def _publish(self, manifest: bytes) -> None:
        """The adapter to the top of the branch that people load, in one commit; then from the job's branch away."""
        if self._waiting is None:
            raise RuntimeError("the adapter's manifest was written before its files")
        folder, self._waiting = self._waiting, None
        if self.exists(f"{ADAPTER}/{MANIFEST_NAME}"):
            raise JobError(
                Reason.OUTPUT_CONFLICT,
                f"Another run has written an adapter to {self.uri} meanwhile: name a repository or a branch of its own "
                "(hf://owner/name@branch).",
            )
        files = parse_manifest(manifest, self.uri).files
        self._commit(
            ADAPTER,
            "Adapter",
            lambda _: [
                *(CommitOperationAdd(path, folder / path) for path in files),
                CommitOperationAdd(MANIFEST_NAME, manifest),
            ],
        )
        self._waiting = folder
        self.delete_tree(ADAPTER)

    def _place(self, key: str) -> tuple[str, str]:
        """(branch, path in the repository) of `key`."""
        if key == MERGED or key.startswith(f"{MERGED}/"):
            return self._main, key
        if self._is_on_top(key):
            return self._main, key.removeprefix(ADAPTER).lstrip("/")
        return self._work, key

    def _is_on_top(self, key: str) -> bool:
        """Whether `key` is of the published adapter, not of one that waits."""
        return self._waiting is None and (key == ADAPTER or key.startswith(f"{ADAPTER}/"))

    def _commit(self, key: str, message: str, operations: Callable[[str], Sequence[Any]]) -> None:
        self._prepare()
        revision, path = self._place(key)

        def send() -> None:
            # Made anew for each try: the library changes them.
            self._api.create_commit(self._repo, operations(path), commit_message=message, revision=revision)

        self._try(send, key)

    def _read(self, call: Callable[[], Any], key: str, *, absent: Any = None) -> Any:
        """What `call` answers; `absent` where there is nothing, if it is given."""
        self._prepare()
        try:
            return self._try(call, key)
        except JobError as error:
            if absent is None or error.reason is not Reason.STORAGE_NOT_FOUND:
                raise
            return absent

    def _prepare(self) -> None:
        """The repository and the job's branch, before anything is trained: who may not write is told at once.

        Raises:
            JobError: OutputConflict, the repository holds a model or adapter that no job of ours made.
        """
        if self._ready:
            return
        self._try(lambda: self._api.create_repo(self._repo, private=True, exist_ok=True), "")
        branches = dict.fromkeys((self._main, self._work)) if self._main != "main" else {self._work: None}
        for branch in branches:
            self._try(partial(self._api.create_branch, self._repo, branch=branch, exist_ok=True), "")
        self._ready = True
        held = set(self.list(ADAPTER))
        found = sorted(name for name in _MODEL_FILES if f"{ADAPTER}/{name}" in held)
        if found and f"{ADAPTER}/{MANIFEST_NAME}" not in held:
            self._ready = False
            raise JobError(
                Reason.OUTPUT_CONFLICT,
                f"{self.uri} already holds {found[0]}, which no job of this kind wrote: name a repository or a branch "
                "of its own (hf://owner/name@branch).",
            )

    def _try(self, call: Callable[[], Any], key: str) -> Any:
        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            retry=retry_if_exception(lambda error: is_transient(_innermost(error))),
            wait=seconds_to_wait,
            sleep=self._sleep,
            before_sleep=say_wait,
            reraise=True,
        )
        with _errors(self.uri_of(key) if key else self.uri):
            return retrying(call)


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """The Hub's refusals as sentences. Not chained: the texts of these exceptions may hold signed addresses."""
    try:
        yield
    except (hub.HFValidationError, hub.HfHubHTTPError, hub.EntryNotFoundError, httpx2.HTTPError) as error:
        raise _explained(error, uri) from None
    except (RuntimeError, ValueError) as error:
        # How the library says that the upload of a large file failed.
        raise _explained(_innermost(error), uri) from None
    except OSError as error:
        raise local_error(error) from error


def _explained(error: BaseException, uri: str) -> JobError:
    where = safe_address(endpoint() or DEFAULT_ENDPOINT)
    if isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, hub.HFValidationError):
        return JobError(Reason.INVALID_SPEC, f"{uri} is no name of a repository: write hf://owner/name.")
    if not isinstance(error, hub.HfHubHTTPError):
        return JobError(
            Reason.HUB_UNAVAILABLE,
            f"The connection to the Hub at {where} broke ({type(error).__name__}, {uri}): check the network and "
            "HF_ENDPOINT.",
        )
    status, has_token = error.response.status_code, huggingface_hub.get_token() is not None
    if status == 401:
        fault = "The Hub refused the token for" if has_token else "No token was sent for"
        return JobError(Reason.STORAGE_ACCESS_DENIED, f"{fault} {uri}: {TOKEN_HELP} with a token that may write to it.")
    if status == 403:
        return JobError(
            Reason.STORAGE_ACCESS_DENIED,
            f"The Hub does not let this token write to {uri}: give it write access to the repository and to its owner, "
            "or free storage there.",
        )
    if status == 404:
        return JobError(Reason.STORAGE_NOT_FOUND, f"There is no {uri} at {where}: correct output.uri.")
    if status in _CHANGED:
        return JobError(Reason.STORAGE_UNAVAILABLE, f"{uri} was changed while it was written to: try again.")
    if status in (408, 429) or status >= 500:
        return JobError(Reason.HUB_UNAVAILABLE, f"The Hub at {where} answered {status} for {uri}: try again later.")
    return JobError(
        Reason.STORAGE_ACCESS_DENIED, f"The Hub at {where} refused {uri} ({status}): check its name and the token."
    )


def _innermost(error: BaseException) -> BaseException:
    """What the Hub said behind what the library makes of it."""
    while isinstance(error, (RuntimeError, ValueError)) and error.__cause__ is not None:
        error = error.__cause__
    return error
