"""An address -> the store or the path behind it, as this machine or pod sees it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from finetune_api.outcome import Reason
from finetune_api.storage_uri import Scheme, StorageUri, UriError, parse, parse_output
from finetune_trainer.errors import JobError
from finetune_trainer.storage.hub_store import HubStore
from finetune_trainer.storage.local_store import LocalStore
from finetune_trainer.storage.s3_store import S3Store
from finetune_trainer.storage.store import ObjectStore

DEFAULT_PVC_ROOT = "/mnt/pvc"
"""Folder under which the pod mounts each claim by its name; FINETUNE_PVC_ROOT overrides it."""


def open_store(uri: str, *, work: str = "finetune") -> ObjectStore:
    """The store at `uri`: s3://bucket/prefix, pvc://claim/path (as mounted in this pod), file:///path, a path, or
    hf://owner/name[@branch].

    Args:
        uri: an output's address.
        work: branch for what is no result, on the Hub.

    Raises:
        JobError: InvalidSpec when `uri` is no such address, StorageNotFound when the claim is not mounted.
    """
    address = parse_output_address(uri)
    match address.scheme:
        case Scheme.S3:
            return S3Store(address)
        case Scheme.HUB_MODEL:
            return HubStore(address, work=work)
        case _:
            return LocalStore(local_path(address), uri=str(address))


def parse_address(uri: str) -> StorageUri:
    """`uri` taken apart; a malformed one is a JobError (InvalidSpec)."""
    return _parsed(uri, parse)


def parse_output_address(uri: str) -> StorageUri:
    """The same of an output, which may be a repository of the Hub."""
    return _parsed(uri, parse_output)


def _parsed(uri: str, how: Callable[[str], StorageUri]) -> StorageUri:
    try:
        return how(uri)
    except UriError as error:
        raise JobError(Reason.INVALID_SPEC, str(error)) from error


def local_path(address: StorageUri) -> Path:
    """Path in this machine or pod of a local or pvc:// address.

    Raises:
        JobError: StorageNotFound when the claim is not mounted.
    """
    if address.scheme is not Scheme.PVC:
        return Path(address.path).expanduser()
    mount = Path(os.environ.get("FINETUNE_PVC_ROOT") or DEFAULT_PVC_ROOT) / address.container
    if not mount.is_dir():
        raise JobError(
            Reason.STORAGE_NOT_FOUND,
            f"The claim of {address} is not mounted at {mount}: outside a cluster set FINETUNE_PVC_ROOT to the folder "
            "that holds the claims, or use a plain path.",
        )
    return mount / address.path
