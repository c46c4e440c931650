"""Every address a job can name, parsed once.

Operator (which volume must be mounted), trainer (what to fetch) and command line (what to refuse early) agree on what
an address means because none of them takes it apart itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Scheme(StrEnum):
    """Kinds of address."""

    S3 = "s3"
    HUB_DATASET = "hf"
    HUB_MODEL = "hf-model"
    """A model repository of the Hub, for results only: models that are read are named without a scheme."""
    PVC = "pvc"
    LOCAL = "file"


READABLE = "s3://bucket/key, hf://datasets/owner/name/file, pvc://claim/path, file:///path or a plain path"

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,62}$")
_CLAIM = re.compile(r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
_HUB_MODEL = re.compile(r"^(?!datasets/|spaces/|models/)([\w.-]+/[\w.-]+)(?:@([A-Za-z0-9][\w.-]{0,127}))?/?$")
_HUB_DATASET = re.compile(r"^datasets/([\w.-]+/[\w.-]+|[\w.-]+)(?:@([^/]+))?/(.+)$")


class UriError(ValueError):
    """An address that cannot be read; the text is a sentence for the user."""


@dataclass(frozen=True)
class StorageUri:
    """An address taken apart."""

    scheme: Scheme
    container: str
    """Bucket (s3), claim name (pvc), `owner/name` (the Hub's); empty for local paths."""
    path: str
    """Key, file in the repository, path in the volume, or the local path; without a trailing slash."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; branch of a hub model."""

    def __str__(self) -> str:
        match self.scheme:
            case Scheme.LOCAL:
                return self.path
            case Scheme.HUB_DATASET:
                revision = f"@{self.revision}" if self.revision else ""
                return f"hf://datasets/{self.container}{revision}/{self.path}"
            case Scheme.HUB_MODEL:
                revision = f"@{self.revision}" if self.revision else ""
                return f"hf://{self.container}{revision}"
            case _:
                return f"{self.scheme}://{self.container}/{self.path}".rstrip("/")

    def join(self, *parts: str) -> StorageUri:
        """The address of something below this one."""
        path = "/".join([self.path.rstrip("/"), *parts]) if self.path else "/".join(parts)
        return StorageUri(self.scheme, self.container, path, self.revision)


def parse(uri: str) -> StorageUri:
    """Take `uri` apart.

    Raises:
        UriError: the scheme is not one we read, or a part is missing or malformed.
    """
    if not uri or uri != uri.strip() or any(ord(character) < 32 for character in uri):
        raise UriError(f"{uri!r} is not an address: write it without spaces around it or control characters.")
    match = _SCHEME.match(uri)
    if match is None:
        return StorageUri(Scheme.LOCAL, "", _without_trailing_slash(uri))
    scheme, rest = match.group(1).lower(), match.group(2)
    match scheme:
        case "s3":
            return _in_container(Scheme.S3, uri, rest, _BUCKET, "s3://bucket/key")
        case "pvc":
            return _in_container(Scheme.PVC, uri, rest, _CLAIM, "pvc://claim/path")
        case "file":
            if not rest.startswith("/"):
                raise UriError(f"{uri!r} names no absolute path: write file:///path or the plain path.")
            return StorageUri(Scheme.LOCAL, "", _without_trailing_slash(rest))
        case "hf":
            return _hub_dataset(uri, rest)
        case _:
            raise UriError(f"{scheme}:// addresses are not read: copy it to one of {READABLE}.")


def parse_output(uri: str) -> StorageUri:
    """Take the address of an output apart: as `parse`, and hf://owner/name or hf://owner/name@branch.

    Raises:
        UriError: nothing can be written there, or the address is malformed.
    """
    if not uri.lower().startswith("hf://"):
        return parse(uri)
    match = _HUB_MODEL.match(uri[len("hf://") :])
    if match is None:
        raise UriError(f"{uri!r} holds no results: write hf://owner/name, or hf://owner/name@branch.")
    return StorageUri(Scheme.HUB_MODEL, match.group(1), "", match.group(2))


def _in_container(scheme: Scheme, uri: str, rest: str, pattern: re.Pattern[str], form: str) -> StorageUri:
    container, _, path = rest.partition("/")
    if not pattern.match(container):
        raise UriError(f"{uri!r} does not have the form {form}.")
    if scheme is Scheme.PVC and ".." in path.split("/"):
        raise UriError(f"{uri!r} leaves its volume: write the path without '..'.")
    return StorageUri(scheme, container, path.strip("/"))


def _hub_dataset(uri: str, rest: str) -> StorageUri:
    match = _HUB_DATASET.match(rest)
    path = match.group(3).strip("/") if match else ""
    # "owner/name" alone also reads as a data set without owner and its file "name"; files have an extension.
    if match is None or not path or ("/" not in match.group(1) and "." not in path):
        raise UriError(f"{uri!r} does not have the form hf://datasets/owner/name/file.jsonl.")
    return StorageUri(Scheme.HUB_DATASET, match.group(1), path, match.group(2))


def _without_trailing_slash(path: str) -> str:
    return path.rstrip("/") or "/"
