"""One S3 object that several processes replace, each only what it has seen.

Conditional writes are young in the protocol: where a server does not know them the object is simply written, and who
wrote last is found out by reading it again.
"""

from __future__ import annotations

from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.exceptions import ClientError

from finetune_api.storage_uri import StorageUri
from finetune_trainer.storage.lease import Seen
from finetune_trainer.storage.s3 import S3Connection, connect

READ_TIMEOUT_SECONDS, ATTEMPTS = 10, 2
"""A lease runs out while a patient client still waits."""
_CHANGED = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "404", "409", "412"}
_UNKNOWN = {"NotImplemented", "501"}
_ABSENT = {"NoSuchKey", "404"}


class S3Slot:
    """The object `key` below the prefix `address`.

    Every method raises JobError: StorageNotFound, StorageAccessDenied, StorageUnavailable or DiskFull.
    """

    def __init__(self, address: StorageUri, key: str, *, connection: S3Connection | None = None) -> None:
        self.uri = f"{address}/{key}"
        self._connection = connection or connect(read_timeout_seconds=READ_TIMEOUT_SECONDS, attempts=ATTEMPTS)
        self._at = {"Bucket": address.container, "Key": f"{address.path}/{key}".lstrip("/")}

    def read(self) -> Seen | None:
        """What is there now, with the store's own times; None when there is nothing."""
        with self._connection.errors(self.uri):
            try:
                answer = self._connection.client.get_object(Bucket=self._at["Bucket"], Key=self._at["Key"])
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else None
            return Seen(answer["Body"].read(), answer["ETag"], answer.get("LastModified"), now)

    def put(self, data: bytes, *, replacing: str | None) -> str | None:
        """Write `data` in place of the content with the ETag `replacing`, or of nothing when that is None.

        Returns:
            The new ETag, or None when something else is there now.
        """
        client = self._connection.client
        condition = {"IfNoneMatch": "*"} if replacing is None else {"IfMatch": replacing}
        answer = self._changing(client.put_object, {**self._at, "Body": data}, condition)
        return None if answer is None else str(answer["ETag"])

    def remove(self, etag: str) -> None:
        """Remove the content with that ETag; nothing happens when something else is there."""
        self._changing(self._connection.client.delete_object, self._at, {"IfMatch": etag})

    def _changing(self, call: Callable[..., Any], what: dict[str, Any], condition: dict[str, str]) -> Any:
        with self._connection.errors(self.uri):
            try:
                return call(**what, **condition)
            except ClientError as error:
                if _code(error) in _CHANGED:
                    return None
                if _code(error) not in _UNKNOWN:
                    raise
            return call(**what)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
