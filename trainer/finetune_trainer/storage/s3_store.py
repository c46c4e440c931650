"""An S3 prefix as a store."""

from __future__ import annotations

import copy
import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError, ReadTimeoutError, ResponseStreamingError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from finetune_api.outcome import Reason
from finetune_api.storage_uri import StorageUri
from finetune_trainer.errors import JobError
from finetune_trainer.storage.errors import is_broken_on_the_way, local_errors
from finetune_trainer.storage.manifest import MANIFEST_NAME
from finetune_trainer.storage.s3 import TRANSFER, S3Connection, connect
from finetune_trainer.storage.store import TreeTransfer

_T = TypeVar("_T")

DAMAGED_ATTEMPTS = 3
_MD5 = re.compile("[0-9a-f]{32}")
_UNEXPLAINED = {"301", "400", "401", "403", "404"}


@dataclass(frozen=True)
class ObjectStat:
    """What identifies an object's content without reading it."""

    size_bytes: int
    etag: str
    encryption: str | None = None
    """How the store encrypts it; a listing does not say."""

    @property
    def md5(self) -> str | None:
        """Digest of the content, where the ETag is one: not of uploads in parts, nor under keys of one's own."""
        bare = self.etag.strip('"')
        return bare if _MD5.fullmatch(bare) and self.encryption in (None, "AES256") else None


class S3Store(TreeTransfer):
    """ObjectStore over an S3 prefix. A put is atomic by the protocol: an object is whole or absent.

    Args:
        address: s3://bucket/prefix.
        connection: the client, made from the environment when None.
        transfer: when and how large files travel in parts.
        before_write: called before anything is written or removed; refuses with a JobError.
    """

    def __init__(
        self,
        address: StorageUri,
        *,
        connection: S3Connection | None = None,
        transfer: TransferConfig = TRANSFER,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.address = address
        self.before_write = before_write
        self._connection = connection or connect()
        self._transfer = transfer

    @property
    def uri(self) -> str:
        return str(self.address)

    def uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    def list(self, prefix: str = "") -> Sequence[str]:
        return sorted(self.stat_tree(prefix))

    def stat_tree(self, prefix: str = "") -> dict[str, ObjectStat]:
        """Every file below the folder `prefix`, by key."""
        base = self._key(prefix)
        base = f"{base}/" if base else ""
        start = len(f"{self.address.path}/") if self.address.path else 0
        pages = self._connection.client.get_paginator("list_objects_v2")
        with self._connection.errors(self.uri_of(prefix)):
            return {
                item["Key"][start:]: ObjectStat(item["Size"], item["ETag"])
                for page in pages.paginate(Bucket=self.address.container, Prefix=base)
                for item in page.get("Contents", [])
                # A key that ends in "/" is a folder that a console or the server itself made.
                if not item["Key"].endswith("/")
            }

    def stat(self, key: str) -> ObjectStat:
        """Size and ETag of `key`.

        Raises:
            JobError: as every method, StorageNotFound included.
        """
        client, bucket, name = self._connection.client, self.address.container, self._key(key)
        with self._connection.errors(self.uri_of(key)):
            try:
                answer = client.head_object(Bucket=bucket, Key=name)
            except ClientError as error:
                # An answer to HEAD has no body, hence only a number; GET tells a missing bucket from a missing key.
                if error.response.get("Error", {}).get("Code") in _UNEXPLAINED:
                    client.get_object(Bucket=bucket, Key=name)["Body"].close()
                raise
        return ObjectStat(answer["ContentLength"], answer["ETag"], answer.get("ServerSideEncryption"))

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except JobError as error:
            if error.reason is Reason.STORAGE_NOT_FOUND:
                return False
            raise
        return True

    def read_bytes(self, key: str) -> bytes:
        def read() -> tuple[bytes, ObjectStat]:
            answer = self._connection.client.get_object(Bucket=self.address.container, Key=self._key(key))
            try:
                data = answer["Body"].read()
            except ReadTimeoutError as error:
                # Within the content; before it, botocore has tried again already.
                raise ResponseStreamingError(error=error) from None
            return data, ObjectStat(len(data), answer["ETag"], answer.get("ServerSideEncryption"))

        seen = set()
        with self._connection.errors(self.uri_of(key)):
            for _ in range(DAMAGED_ATTEMPTS):
                data, stat = _whole(read)
                if stat.md5 in (None, hashlib.md5(data, usedforsecurity=False).hexdigest()) or data in seen:
                    return data
                seen.add(data)
        raise self._damaged(key)

    def write_bytes(self, key: str, data: bytes) -> None:
        self.before_write()
        with self._connection.errors(self.uri_of(key)):
            put = self._connection.client.put_object
            _whole(lambda: put(Bucket=self.address.container, Key=self._key(key), Body=data))

    def upload_file(self, file: Path, key: str) -> None:
        self.before_write()
        with self._connection.errors(self.uri_of(key)):
            upload = self._connection.client.upload_file
            _whole(lambda: upload(str(file), self.address.container, self._key(key), Config=self._in_this_thread()))

    def download_file(self, key: str, file: Path) -> None:
        stat, seen = self.stat(key), set()
        for _ in range(DAMAGED_ATTEMPTS):
            with self._connection.errors(self.uri_of(key)):
                self._connection.client.download_file(
                    self.address.container, self._key(key), str(file), Config=self._in_this_thread()
                )
            with local_errors(file):
                digest = file_md5(file) if stat.md5 else None
            # Two that are alike are right, and the ETag is no digest, or the object was replaced meanwhile.
            if digest == stat.md5 or digest in seen:
                return
            seen.add(digest)
        file.unlink(missing_ok=True)
        raise self._damaged(key)

    def delete(self, key: str) -> None:
        self.before_write()
        with self._connection.errors(self.uri_of(key)):
            self._connection.client.delete_object(Bucket=self.address.container, Key=self._key(key))

    def delete_tree(self, prefix: str) -> None:
        keys = self.list(prefix)
        # One by one: the batch call needs a checksum that some servers do not accept.
        for key in sorted(keys, key=lambda key: (key.rpartition("/")[2] != MANIFEST_NAME, key)):
            self.delete(key)

    def _damaged(self, key: str) -> JobError:
        return JobError(
            Reason.STORAGE_UNAVAILABLE,
            f"{self.uri_of(key)} arrives damaged, each time in another way: check the network, or use https.",
        )

    def _in_this_thread(self) -> TransferConfig:
        """In the background without a pool: at its end a process waits for every pool, also for one that hangs."""
        if threading.current_thread() is threading.main_thread():
            return self._transfer
        transfer = copy.copy(self._transfer)
        transfer.use_threads = False
        return transfer

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.address.path, key.strip("/")) if part)


def file_md5(file: Path) -> str:
    """Digest of a file's content, as ETags are."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _whole(call: Callable[[], _T]) -> _T:
    """`call`, again where content was damaged on its way."""
    retrying = Retrying(
        retry=retry_if_exception(is_broken_on_the_way),
        stop=stop_after_attempt(DAMAGED_ATTEMPTS),
        wait=wait_exponential(multiplier=0.2),
        reraise=True,
    )
    return retrying(call)
