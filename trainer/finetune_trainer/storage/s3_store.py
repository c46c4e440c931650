"""An S3 prefix as a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from finetune_api.outcome import Reason
from finetune_api.storage_uri import StorageUri
from finetune_trainer.errors import JobError
from finetune_trainer.storage.manifest import MANIFEST_NAME
from finetune_trainer.storage.s3 import TRANSFER, S3Connection, connect
from finetune_trainer.storage.store import TreeTransfer

_UNEXPLAINED = {"301", "400", "401", "403", "404"}


@dataclass(frozen=True)
class ObjectStat:
    """What identifies an object's content without reading it."""

    size_bytes: int
    etag: str


class S3Store(TreeTransfer):
    """ObjectStore over an S3 prefix. A put is atomic by the protocol: an object is whole or absent."""

    def __init__(
        self, address: StorageUri, *, connection: S3Connection | None = None, transfer: TransferConfig = TRANSFER
    ) -> None:
        self._address = address
        self._connection = connection or connect()
        self._transfer = transfer

    @property
    def uri(self) -> str:
        return str(self._address)

    def uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    def list(self, prefix: str = "") -> Sequence[str]:
        return sorted(self.stat_tree(prefix))

    def stat_tree(self, prefix: str = "") -> dict[str, ObjectStat]:
        """Every file below the folder `prefix`, by key."""
        base = self._key(prefix)
        base = f"{base}/" if base else ""
        start = len(f"{self._address.path}/") if self._address.path else 0
        pages = self._connection.client.get_paginator("list_objects_v2")
        with self._connection.errors(self.uri_of(prefix)):
            return {
                item["Key"][start:]: ObjectStat(item["Size"], item["ETag"])
                for page in pages.paginate(Bucket=self._address.container, Prefix=base)
                for item in page.get("Contents", [])
                # A key that ends in "/" is a folder that a console or the server itself made.
                if not item["Key"].endswith("/")
            }

    def stat(self, key: str) -> ObjectStat:
        """Size and ETag of `key`.

        Raises:
            JobError: as every method, StorageNotFound included.
        """
        client, bucket, name = self._connection.client, self._address.container, self._key(key)
        with self._connection.errors(self.uri_of(key)):
            try:
                answer = client.head_object(Bucket=bucket, Key=name)
            except ClientError as error:
                # An answer to HEAD has no body, hence only a number; GET tells a missing bucket from a missing key.
                if error.response.get("Error", {}).get("Code") in _UNEXPLAINED:
                    client.get_object(Bucket=bucket, Key=name)["Body"].close()
                raise
        return ObjectStat(answer["ContentLength"], answer["ETag"])

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except JobError as error:
            if error.reason is Reason.STORAGE_NOT_FOUND:
                return False
            raise
        return True

    def read_bytes(self, key: str) -> bytes:
        with self._connection.errors(self.uri_of(key)):
            answer = self._connection.client.get_object(Bucket=self._address.container, Key=self._key(key))
            return answer["Body"].read()

    def write_bytes(self, key: str, data: bytes) -> None:
        with self._connection.errors(self.uri_of(key)):
            self._connection.client.put_object(Bucket=self._address.container, Key=self._key(key), Body=data)

    def upload_file(self, file: Path, key: str) -> None:
        with self._connection.errors(self.uri_of(key)):
            self._connection.client.upload_file(
                str(file), self._address.container, self._key(key), Config=self._transfer
            )

    def download_file(self, key: str, file: Path) -> None:
        with self._connection.errors(self.uri_of(key)):
            self._connection.client.download_file(
                self._address.container, self._key(key), str(file), Config=self._transfer
            )

    def delete(self, key: str) -> None:
        with self._connection.errors(self.uri_of(key)):
            self._connection.client.delete_object(Bucket=self._address.container, Key=self._key(key))

    def delete_tree(self, prefix: str) -> None:
        keys = self.list(prefix)
        # One by one: the batch call needs a checksum that some servers do not accept.
        for key in sorted(keys, key=lambda key: (key.rpartition("/")[2] != MANIFEST_NAME, key)):
            self.delete(key)

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self._address.path, key.strip("/")) if part)
