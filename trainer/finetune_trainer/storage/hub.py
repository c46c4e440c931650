"""Downloads from the Hugging Face Hub or a mirror of it, with answers that say what to do.

The address is read from HF_ENDPOINT at each call, the token is found by huggingface_hub itself (HF_TOKEN, then the
login's file; an empty HF_TOKEN counts as none).
"""

from __future__ import annotations

import glob
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub
from huggingface_hub.hf_api import RepoSibling
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage.errors import human_bytes, local_error, require_space, safe_address
from finetune_trainer.storage.hub_cache import Lack, Snapshot, cached_snapshot, is_damaged
from finetune_trainer.storage.model_files import Select

_log = logging.getLogger(__name__)

DEFAULT_ENDPOINT = "https://huggingface.co"
ATTEMPTS = 5
TIMEOUT_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 310
"""The Hub counts requests in windows of five minutes."""
TOKEN_HELP = "set HF_TOKEN (in a cluster: spec.secrets.huggingFace)"
_BUSY = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class _Asked:
    """What was asked for, for the messages."""

    name: str
    key: str
    """Key of the job that a wrong name is corrected in."""
    revision: str | None
    not_found: Reason
    denied: Reason
    page: str


def endpoint() -> str | None:
    """HF_ENDPOINT without a trailing slash, None for the Hub itself."""
    return (os.environ.get("HF_ENDPOINT") or "").strip().rstrip("/") or None


def download_snapshot(
    repo_id: str,
    revision: str | None,
    select: Select,
    *,
    cache_dir: Path | None = None,
    key: str = "model_id",
    sleep: Callable[[float], None] = time.sleep,
) -> Snapshot:
    """Fetch the files of model `repo_id` that `select` picks into the Hub's cache and return their folder.

    A commit that is already complete in the cache is used without asking; so is the last known one, with a warning,
    when the Hub does not answer.

    Args:
        repo_id: owner/name.
        revision: Branch, tag or commit; None is the main branch.
        cache_dir: Folder of the cache, huggingface_hub's own when None.
        key: Key of the job that `repo_id` is written in.
        sleep: Waits between tries, for tests.

    Raises:
        JobError: ModelNotFound, ModelAccessDenied, ModelUnsupported (from `select`), HubUnavailable or DiskFull.
    """
    asked = _Asked(
        repo_id,
        key,
        revision,
        Reason.MODEL_NOT_FOUND,
        Reason.MODEL_ACCESS_DENIED,
        f"{endpoint() or DEFAULT_ENDPOINT}/{repo_id}",
    )
    offline = huggingface_hub.is_offline_mode()
    if offline or (revision is not None and len(revision) == 40):
        # Whoever may ask the Hub is not content with a cache that cannot be known to be complete.
        found = cached_snapshot(repo_id, revision, select, cache_dir, complete=not offline)
        if isinstance(found, Snapshot):
            return found
        if offline and found.partly:
            raise JobError(
                asked.not_found,
                f"{repo_id} is {found.what}, and HF_HUB_OFFLINE forbids to fetch the rest: unset it for one run.",
            )
    try:
        return _download_snapshot(asked, select, cache_dir, sleep)
    except JobError as error:
        if error.reason is not Reason.HUB_UNAVAILABLE:
            raise
        found = cached_snapshot(repo_id, revision, select, cache_dir, complete=False)
        if isinstance(found, Lack):
            if not found.partly:
                raise
            raise JobError(error.reason, f"{error.message.rstrip('.')} ({repo_id} is {found.what}).") from error
        _log.warning("%s Going on with the copy in the cache (commit %s).", error.message, found.commit)
        return found


def download_dataset_file(repo_id: str, revision: str | None, path: str, *, cache_dir: Path | None = None) -> Path:
    """Fetch one file of the dataset repository `repo_id` into the Hub's cache.

    Raises:
        JobError: StorageNotFound, StorageAccessDenied, HubUnavailable or DiskFull.
    """
    uri = f"hf://datasets/{repo_id}{f'@{revision}' if revision else ''}/{path}"
    page = f"{endpoint() or DEFAULT_ENDPOINT}/datasets/{repo_id}"
    asked = _Asked(uri, "the address", revision, Reason.STORAGE_NOT_FOUND, Reason.STORAGE_ACCESS_DENIED, page)
    with _errors(asked):
        return Path(
            huggingface_hub.hf_hub_download(
                repo_id,
                path,
                repo_type="dataset",
                revision=revision,
                cache_dir=cache_dir,
                endpoint=endpoint(),
                etag_timeout=TIMEOUT_SECONDS,
            )
        )


def _download_snapshot(
    asked: _Asked, select: Select, cache_dir: Path | None, sleep: Callable[[float], None]
) -> Snapshot:
    api = huggingface_hub.HfApi(endpoint=endpoint())
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        retry=retry_if_exception(is_transient),
        wait=seconds_to_wait,
        sleep=sleep,
        before_sleep=say_wait,
        reraise=True,
    )
    with _errors(asked):
        info = retrying(
            api.model_info, asked.name, revision=asked.revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = select(sizes)
        described = {file.rfilename: file for file in info.siblings or []}
        missing = [path for path in wanted if not _is_cached(asked.name, described[path], info.sha, cache_dir)]
        size = sum(sizes[path] for path in missing)
        require_space(cache_dir or Path(constants.HF_HUB_CACHE), size, asked.name)
        if missing:
            _log.info("Downloading %s: %d files, %s.", asked.name, len(missing), human_bytes(size))
        folder = huggingface_hub.snapshot_download(
            asked.name,
            revision=asked.revision,
            cache_dir=cache_dir,
            endpoint=endpoint(),
            etag_timeout=TIMEOUT_SECONDS,
            allow_patterns=[glob.escape(path) for path in wanted],
        )
    return Snapshot(Path(folder), Path(folder).name)


def _is_cached(repo_id: str, described: RepoSibling, commit: str | None, cache_dir: Path | None) -> bool:
    """Whether the file is there. A damaged one is removed: the library would take it for whole."""
    found = huggingface_hub.try_to_load_from_cache(repo_id, described.rfilename, cache_dir=cache_dir, revision=commit)
    if not isinstance(found, str):
        return False
    file = Path(found)
    if not is_damaged(file, described):
        return True
    _log.warning("%s in the cache is damaged, it is fetched again.", file)
    file.resolve().unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    return False


@contextmanager
def _errors(asked: _Asked) -> Iterator[None]:
    try:
        yield
    except (hub.HfHubHTTPError, hub.EntryNotFoundError, hub.HFValidationError, hub.XetDownloadError) as error:
        # Not chained: the texts of these exceptions may hold signed addresses.
        raise _explain(error, asked) from None
    except (httpx2.HTTPError, hub.OfflineModeIsEnabled, hub.FileMetadataError) as error:
        raise _explain(error, asked) from None
    except OSError as error:
        raise local_error(error) from error


def _explain(error: BaseException, asked: _Asked) -> JobError:
    """The sentence for `error`; looks behind "not in the cache either" at what the Hub said."""
    while isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    where = safe_address(endpoint() or DEFAULT_ENDPOINT)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return JobError(
            asked.not_found, f"{asked.name} is not in the cache and HF_HUB_OFFLINE forbids to fetch it: unset it."
        )
    if isinstance(error, hub.HFValidationError):
        return JobError(
            asked.not_found,
            f"{asked.name!r} is neither a folder nor a Hub name (owner/name): correct {asked.key}.",
        )
    if isinstance(error, hub.FileMetadataError):
        return JobError(asked.not_found, f"{where} is not a Hugging Face Hub: correct HF_ENDPOINT.")
    if isinstance(error, hub.HfHubHTTPError):
        return _answered(error, asked, where)
    return JobError(
        Reason.HUB_UNAVAILABLE,
        f"The Hub at {where} cannot be reached for {asked.name} ({type(error).__name__}): check the network and "
        "HF_ENDPOINT, or name a folder or an s3:// address instead.",
    )


def _answered(error: hub.HfHubHTTPError, asked: _Asked, where: str) -> JobError:
    status = error.response.status_code
    has_token = huggingface_hub.get_token() is not None
    if isinstance(error, hub.RevisionNotFoundError):
        key = "model_revision" if asked.key == "model_id" else asked.key
        return JobError(asked.not_found, f"{asked.name} has no revision {asked.revision!r}: correct {key}.")
    if isinstance(error, hub.EntryNotFoundError):
        return JobError(asked.not_found, f"There is no {asked.name} on the Hub: correct {asked.key}.")
    if isinstance(error, hub.DisabledRepoError):
        return JobError(asked.denied, f"The Hub has disabled access to {asked.name}: see {asked.page}.")
    if status == 401 and has_token:
        return JobError(
            asked.denied, f"The Hub refused the token for {asked.name} (mistyped, expired or revoked): {TOKEN_HELP}."
        )
    if isinstance(error, hub.GatedRepoError) and status == 401:
        return JobError(
            asked.denied,
            f"{asked.name} is gated and no token was sent: accept its licence at {asked.page} and {TOKEN_HELP}.",
        )
    if isinstance(error, hub.GatedRepoError) or status == 403:
        if has_token:
            return JobError(
                asked.denied,
                f"The token has no access to {asked.name}: accept its licence at {asked.page} with the token's account "
                "and let the token read gated repositories.",
            )
        return JobError(asked.denied, f"{asked.name} is not public: ask for access at {asked.page} and {TOKEN_HELP}.")
    if status == 401:
        # The Hub gives the same answer for a name that does not exist.
        named = error.response.headers.get("X-Error-Code") == "RepoNotFound"
        return JobError(
            asked.not_found if named else asked.denied,
            f"The Hub shows no {asked.name} without a token: correct {asked.key}, or, if it is private, {TOKEN_HELP}.",
        )
    if status == 404:
        hint = "" if has_token else f", or, if it is private, {TOKEN_HELP}"
        return JobError(asked.not_found, f"There is no {asked.name} at {where}: correct {asked.key}{hint}.")
    if status == 429:
        hint = "" if has_token else f", or {TOKEN_HELP}, which allows more requests"
        return JobError(Reason.HUB_UNAVAILABLE, f"The Hub limits requests for {asked.name}: try again later{hint}.")
    if status >= 500 or status == 408:
        return JobError(
            Reason.HUB_UNAVAILABLE, f"The Hub at {where} answered {status} for {asked.name}: try again later."
        )
    return JobError(asked.not_found, f"The Hub at {where} answered {status} for {asked.name}: correct {asked.key}.")


def is_transient(error: BaseException) -> bool:
    """Whether another try at the Hub may succeed."""
    if isinstance(error, hub.HfHubHTTPError):
        return error.response.status_code in _BUSY
    return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol)


def seconds_to_wait(state: RetryCallState) -> float:
    """Seconds until the next try: what the Hub asks for, else 1, 2, 4, 8."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, hub.HfHubHTTPError):
        asked_for = error.response.headers.get("Retry-After", "").strip()
        if asked_for.isdigit():
            return float(min(int(asked_for) + 1, LONGEST_WAIT_SECONDS))
    return float(min(2 ** (state.attempt_number - 1), 8))


def say_wait(state: RetryCallState) -> None:
    """Log why there is another try, and when."""
    error = state.outcome.exception() if state.outcome else None
    said = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else type(error).__name__
    seconds = state.next_action.sleep if state.next_action else 0
    host = urlsplit(endpoint() or DEFAULT_ENDPOINT).hostname
    _log.warning("%s: %s, next try in %.0f s.", host, said, seconds)
