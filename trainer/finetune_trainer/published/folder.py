"""An adapter's folder as verification sees it: where it is, its tokenizer, its golden prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from finetune_api.outcome import Reason
from finetune_api.storage_uri import Scheme
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.storage import ObjectStore, open_store
from finetune_trainer.storage.addresses import local_path, parse_output_address
from finetune_trainer.storage.hub import download_snapshot

CONFIG = "adapter_config.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIG_LIMIT_BYTES = 8 << 20


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on this machine."""

    path: Path
    address: str
    """What the user called it."""
    config: dict[str, Any]
    """adapter_config.json."""

    @property
    def base_model(self) -> str | None:
        """Where the adapter's base model is, as it says itself."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def base_revision(self) -> str | None:
        """Its commit."""
        revision = self.config.get("revision")
        return revision if isinstance(revision, str) and revision else None

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer, without what transformers makes of it.

        Raises:
            JobError: InvalidSpec, there is none that can be read.
        """
        try:
            return tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
        except Exception as error:  # The library raises bare Exceptions.
            raise JobError(
                Reason.INVALID_SPEC,
                f"{self.path / 'tokenizer.json'} cannot be read ({first_line(error)}): copy the adapter again.",
            ) from error


def open_adapter(address: str, scratch: Path, *, weights: bool) -> AdapterFolder:
    """The adapter at `address`, or in the folder `adapter` there, as jobs leave it.

    Args:
        address: folder, pvc://, s3:// or hf:// address, or a Hub name.
        scratch: an empty folder, for what has to be fetched.
        weights: whether they are needed.

    Raises:
        JobError: there is no adapter, or it cannot be had.
    """
    place = parse_output_address(address)
    hub = partial(_on_top, weights=weights)
    if place.scheme is Scheme.HUB_MODEL:
        path = download_snapshot(place.container, place.revision, hub, key="ADAPTER").path
    elif place.scheme is Scheme.S3:
        path = _fetched(open_store(address), scratch / "adapter", weights=weights)
    else:
        path = local_path(place)
        if not path.exists() and place.scheme is Scheme.LOCAL and HUB_NAME.fullmatch(address):
            path = download_snapshot(address, None, hub, key="ADAPTER").path
        if not (path / CONFIG).is_file() and (path / "adapter" / CONFIG).is_file():
            path = path / "adapter"
    return AdapterFolder(path, address, _config(path, address))


def _fetched(store: ObjectStore, folder: Path, *, weights: bool) -> Path:
    """A copy of what lies there, as it lies there: a manifest that disagrees is for the verdict to tell."""
    prefix = "" if store.exists(CONFIG) or not store.exists(f"adapter/{CONFIG}") else "adapter/"
    keys = {key.removeprefix(prefix): key for key in store.list(prefix.rstrip("/"))}
    for path in _wanted(keys, weights=weights):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        store.download_file(keys[path], folder / path)
    return folder


def _wanted(paths: Iterable[str], *, weights: bool) -> list[str]:
    """Those of `paths` that stay in their folder."""
    inside = [path for path in paths if not path.startswith("/") and ".." not in path.split("/")]
    return [path for path in inside if weights or not path.endswith((".safetensors", ".bin"))]


def _on_top(paths: Iterable[str], *, weights: bool) -> list[str]:
    """The adapter's files in a repository: what lies deeper is another model's."""
    return _wanted([path for path in paths if "/" not in path and not path.startswith(".")], weights=weights)


def _config(path: Path, address: str) -> dict[str, Any]:
    try:
        with (path / CONFIG).open("rb") as file:
            content = json.loads(file.read(_CONFIG_LIMIT_BYTES))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "There is nothing at" if not path.exists() else f"There is no {CONFIG} in"
        raise JobError(
            Reason.MODEL_NOT_FOUND, f"{what} {address}: name an adapter's folder, or the output of a finished job."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(Reason.INVALID_SPEC, f"{path / CONFIG} cannot be read: copy the adapter again.") from error
    if not isinstance(content, dict):
        raise JobError(Reason.INVALID_SPEC, f"{path / CONFIG} is no JSON object: copy the adapter again.")
    return content
