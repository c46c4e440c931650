"""What a store's or the file system's refusal means for the person who applied the job.

Libraries answer with codes, class names and addresses that may carry a signature. Only sentences of our own leave
this module, so neither credentials nor presigned addresses reach a log.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from boto3.exceptions import Boto3Error
from botocore import exceptions as aws
from s3transfer.exceptions import RetriesExceededError

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

_MISSING_BUCKET = {"NoSuchBucket", "InvalidBucketName"}
_MISSING_OBJECT = {"NoSuchKey", "NotFound", "404", "NoSuchVersion"}
_BAD_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "XAdminUserNotFound",
}
"""The last one is how versitygw says InvalidAccessKeyId."""
_DENIED = {"AccessDenied", "AccountProblem", "AllAccessDisabled", "Forbidden", "UnauthorizedAccess", "401", "403"}
_OTHER_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301"}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507"}
_ON_THE_WAY = {"BadDigest", "IncompleteBody", "NoSuchUpload", "RequestTimeout", "XAmzContentSHA256Mismatch"}
"""The content did not arrive as it was sent; or the answer was lost that an upload in parts is complete."""
_RETRYABLE = {0, 408, 412, 429}
"""No answer at all, too slow, changed meanwhile, too many."""
_THROTTLED = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}
_LOCAL_FULL = {errno.ENOSPC, errno.EDQUOT}

CREDENTIALS_HELP = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in a cluster: spec.secrets.objectStore)"


def s3_error(error: BaseException, uri: str, *, endpoint: str | None, signed: bool) -> JobError:
    """The failure of an S3 call on `uri` as a JobError; `signed` says whether credentials were sent."""
    error = _innermost(error)
    where = f" at {safe_address(endpoint)}" if endpoint else ""
    if isinstance(error, OSError) and not isinstance(error, aws.BotoCoreError):
        return local_error(error)
    if isinstance(error, aws.ClientError):
        return _answered(error, uri, where, signed)
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError | aws.CredentialRetrievalError):
        return JobError(Reason.STORAGE_ACCESS_DENIED, f"The credentials for {uri} are incomplete: {CREDENTIALS_HELP}.")
    if isinstance(error, aws.SSLError):
        return JobError(
            Reason.STORAGE_UNAVAILABLE,
            f"The TLS certificate of the object store{where} is not trusted: name its authority's file in "
            f"AWS_CA_BUNDLE ({uri}).",
        )
    if isinstance(error, aws.ConnectTimeoutError | aws.EndpointConnectionError | aws.ProxyConnectionError):
        return JobError(
            Reason.STORAGE_UNAVAILABLE,
            f"The object store{where} does not answer ({uri}): check AWS_ENDPOINT_URL_S3 and the network.",
        )
    return JobError(
        Reason.STORAGE_UNAVAILABLE,
        f"The connection to the object store{where} broke ({type(error).__name__}, {uri}): try again.",
    )


def _answered(error: aws.ClientError, uri: str, where: str, signed: bool) -> JobError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _MISSING_BUCKET:
        bucket = urlsplit(uri).netloc
        return JobError(Reason.STORAGE_NOT_FOUND, f"There is no bucket {bucket!r}{where}: create it or correct {uri}.")
    if code in _MISSING_OBJECT:
        return JobError(Reason.STORAGE_NOT_FOUND, f"There is no {uri}{where}: correct the address or upload it.")
    if code in _BAD_CREDENTIALS:
        return JobError(
            Reason.STORAGE_ACCESS_DENIED,
            f"The object store{where} refused the credentials ({code}) for {uri}: {CREDENTIALS_HELP}.",
        )
    if code in _DENIED and not signed:
        return JobError(
            Reason.STORAGE_ACCESS_DENIED,
            f"{uri}{where} is not public and no credentials were found: {CREDENTIALS_HELP}.",
        )
    if code in _DENIED:
        return JobError(
            Reason.STORAGE_ACCESS_DENIED,
            f"The credentials may not use {uri}{where}, or it does not exist: grant access or correct the address.",
        )
    if code == "RequestTimeTooSkewed":
        return JobError(
            Reason.STORAGE_UNAVAILABLE, f"This machine's clock is wrong, so {uri} refused it: set the clock."
        )
    if code in _OTHER_REGION:
        return JobError(
            Reason.STORAGE_ACCESS_DENIED, f"The bucket of {uri} is in another region: set AWS_REGION to its region."
        )
    if code in _FULL:
        return JobError(
            Reason.DISK_FULL, f"The object store{where} has no space left for {uri}: free some or raise the quota."
        )
    if code in _ON_THE_WAY:
        return JobError(
            Reason.STORAGE_UNAVAILABLE, f"{uri} was damaged on its way to the object store{where} ({code}): try again."
        )
    if status in _RETRYABLE or status >= 500 or code in _THROTTLED:
        return JobError(
            Reason.STORAGE_UNAVAILABLE, f"The object store{where} answered {code or status} for {uri}: try again later."
        )
    return JobError(
        Reason.STORAGE_ACCESS_DENIED,
        f"The object store{where} refused {uri} ({code or status}): check the address and the credentials.",
    )


def is_broken_on_the_way(error: BaseException) -> bool:
    """Whether content was lost or changed between here and the store, which botocore itself does not try again."""
    error = _innermost(error)
    if isinstance(error, aws.ClientError):
        return error.response.get("Error", {}).get("Code") in _ON_THE_WAY
    return isinstance(error, aws.IncompleteReadError | aws.ResponseStreamingError)


def local_error(error: OSError, path: str | Path | None = None) -> JobError:
    """The failure of a file operation as a JobError; `path` when the error itself does not carry it."""
    named = str(error.filename or path or "a file")
    if error.errno in _LOCAL_FULL:
        return JobError(
            Reason.DISK_FULL, f"The disk is full{_free(named)}: free space or mount a larger volume for {named}."
        )
    if isinstance(error, FileNotFoundError):
        return JobError(Reason.STORAGE_NOT_FOUND, f"There is no {named}: correct the path.")
    if isinstance(error, IsADirectoryError):
        return JobError(Reason.STORAGE_NOT_FOUND, f"{named} is a folder, a file is needed: name the file in it.")
    if isinstance(error, NotADirectoryError | FileExistsError):
        return JobError(Reason.STORAGE_NOT_FOUND, f"{named} is not a folder, but one is needed: choose another path.")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return JobError(
            Reason.STORAGE_ACCESS_DENIED, f"{named} may not be read or written by this user: change its permissions."
        )
    return JobError(
        Reason.STORAGE_UNAVAILABLE,
        f"{named} cannot be used ({error.strerror or type(error).__name__}): check the volume.",
    )


@contextmanager
def local_errors(path: str | Path | None = None) -> Iterator[None]:
    """Turn file system errors inside the block into JobErrors."""
    try:
        yield
    except OSError as error:
        raise local_error(error, path) from error


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse before a download that cannot fit.

    Raises:
        JobError: DiskFull.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if needed_bytes > free:
        raise JobError(
            Reason.DISK_FULL,
            f"{what} needs {human_bytes(needed_bytes)} but {folder} has {human_bytes(free)} free: "
            "free space or mount a larger volume there.",
        )


def human_bytes(count: int) -> str:
    """`count` bytes with a decimal unit, as disks are sold: 269000000 -> '269 MB'."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}" if size < 100 else f"{size:.0f} {units[0]}"


def safe_address(address: str) -> str:
    """scheme://host:port of `address`: no user name, password, query or signature."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _free(path: str) -> str:
    try:
        return f" ({human_bytes(shutil.disk_usage(_existing(Path(path))).free)} free)"
    except OSError:
        return ""


def _existing(path: Path) -> Path:
    """The nearest folder that exists, which tells the file system a new `path` would be on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _innermost(error: BaseException) -> BaseException:
    """The answer of the store behind the wrappers that the transfer libraries put around it."""
    if isinstance(error, RetriesExceededError) and error.last_exception is not None:
        return _innermost(error.last_exception)
    if isinstance(error, Boto3Error) and error.__context__ is not None:
        return _innermost(error.__context__)
    return error
