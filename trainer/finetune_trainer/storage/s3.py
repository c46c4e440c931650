"""S3 clients that work with AWS and with the servers that only speak its protocol.

boto3's own defaults add checksums that many of those refuse above the multipart size, know nothing of buckets
that are public, and read only one of the two variables a cluster sets for the region.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, InvalidRegionError, ProfileNotFound
from s3transfer.exceptions import RetriesExceededError

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.storage.errors import local_error, s3_error, safe_address

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

DEFAULT_REGION = "us-east-1"
CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 60
MAX_ATTEMPTS = 6
"""Tries per request, AWS_MAX_ATTEMPTS overrides it. Only a server that says it is busy is given more than a second."""
MIB = 1024 * 1024
TRANSFER = TransferConfig(multipart_threshold=16 * MIB, multipart_chunksize=16 * MIB, max_concurrency=8)
"""Larger files travel in parts. boto3 raises the part size itself where a file would need more than 10 000 parts."""


@dataclass(frozen=True)
class _Patience:
    """How long a client waits for a server."""

    read_timeout_seconds: int
    attempts: int


@dataclass(frozen=True)
class S3Connection:
    """A client and what error messages need to know about it."""

    client: S3Client
    endpoint: str | None
    """Address of the server; None for AWS itself."""
    signed: bool
    """Whether requests carry credentials. Without any, only public buckets can be read."""
    patience: _Patience

    def anonymous(self) -> S3Connection:
        """The same server without credentials."""
        return replace(self, client=_client(boto3.Session(), self.endpoint, self.patience, signed=False), signed=False)

    @contextmanager
    def errors(self, uri: str) -> Iterator[None]:
        """Turn failures of calls on `uri` inside the block into JobErrors."""
        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error, RetriesExceededError) as error:
            # Not chained: the texts of these exceptions may hold signed addresses.
            raise s3_error(error, uri, endpoint=self.endpoint, signed=self.signed) from None
        except OSError as error:
            raise local_error(error) from error


def connect(*, read_timeout_seconds: int | None = None, attempts: int | None = None) -> S3Connection:
    """A connection as the AWS variables (or files) describe it; without credentials it is an anonymous one.

    Args:
        read_timeout_seconds: how long an answer may take to go on, READ_TIMEOUT_SECONDS when None.
        attempts: tries per request, AWS_MAX_ATTEMPTS or MAX_ATTEMPTS when None.

    Raises:
        JobError: InvalidSpec when a variable cannot be read, StorageAccessDenied when the profile does not exist.
    """
    asked = os.environ.get("AWS_MAX_ATTEMPTS") or str(MAX_ATTEMPTS)
    if not asked.isdigit() or int(asked) < 1:
        raise JobError(Reason.INVALID_SPEC, f"AWS_MAX_ATTEMPTS is {asked!r}: write a whole number from 1.")
    patience = _Patience(read_timeout_seconds or READ_TIMEOUT_SECONDS, attempts or int(asked))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    try:
        session = boto3.Session()
        signed = session.get_credentials() is not None
        client = _client(session, endpoint, patience, signed=signed)
    except InvalidRegionError as error:
        raise JobError(Reason.INVALID_SPEC, "AWS_REGION is not the name of a region such as us-east-1.") from error
    except ValueError as error:
        raise JobError(
            Reason.INVALID_SPEC,
            f"AWS_ENDPOINT_URL_S3 is {safe_address(endpoint or '')!r}: write an address such as https://s3.example.com.",
        ) from error
    except ProfileNotFound as error:
        raise JobError(
            Reason.STORAGE_ACCESS_DENIED, "The profile that AWS_PROFILE names does not exist: unset it or create it."
        ) from error
    # A configuration file may name the endpoint too.
    endpoint = endpoint or (None if ".amazonaws.com" in client.meta.endpoint_url else client.meta.endpoint_url)
    return S3Connection(client, endpoint, signed, patience)


def read_with_fallback(connection: S3Connection, read: Callable[[S3Connection], _T]) -> _T:
    """`read` with credentials, and once more without when they are refused.

    One job may read a public bucket of somebody else's and write to its own: the credentials of the second mean
    nothing, or are even refused, at the first.

    Raises:
        JobError: of the first try.
    """
    try:
        return read(connection)
    except JobError as refused:
        if refused.reason is not Reason.STORAGE_ACCESS_DENIED or not connection.signed:
            raise
        try:
            result = read(connection.anonymous())
        except JobError:
            raise refused from None
        _log.warning("%s It is public, so it was read without credentials.", refused.message)
        return result


def _client(session: boto3.Session, endpoint: str | None, patience: _Patience, *, signed: bool) -> S3Client:
    region = os.environ.get("AWS_REGION") or session.region_name or DEFAULT_REGION
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=patience.read_timeout_seconds,
        retries={"mode": "adaptive", "total_max_attempts": patience.attempts},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # A server of one's own rarely has a DNS name per bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
        max_pool_connections=2 * TRANSFER.max_request_concurrency,
    )
    if not signed:
        config = config.merge(Config(signature_version=UNSIGNED))
    return session.client("s3", region_name=region, endpoint_url=endpoint, config=config)
