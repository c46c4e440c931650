"""What stands in a namespace's ConfigMap, so that trainers trust every installation that looks after it: pure.

Each installation keeps its own certificates under a key of its own; under CA_KEY, which trainers read, are those of
all. So two installations with overlapping namespaces do not undo each other's work, and one that has a new authority
takes back the old.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from heapq import nsmallest
from typing import Any

from finetune_operator.names import CA_KEY
from finetune_operator.progress.certificates import valid_certificates

SUFFIX = ".crt"
KEY_CHARACTERS = 253
"""Most that the key of a ConfigMap may have."""
OTHERS = 8
OTHER_CHARACTERS = 16 * 1024
"""Installations beside ours whose certificates are handed on, and how long each one's may be: anybody in the namespace
can write there."""
TRIED = 64
"""Keys that are looked into for them, the first by name: a ConfigMap has room for a hundred thousand."""


def bundle_key(namespace: str, secret: str) -> str:
    """The key of the installation that keeps its authority in that Secret."""
    return f"{namespace}.{secret}"[: KEY_CHARACTERS - len(SUFFIX)] + SUFFIX


def merged(found: Any, key: str, ours: str, now: datetime) -> dict[str, str]:
    """What the ConfigMap is to hold.

    Args:
        found: its data now, whatever somebody has made of it.
        key: ours, see `bundle_key`.
        ours: PEM of our certificates.
        now: UTC; what has expired is left out.
    """
    data: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    parts = {key: ours}
    for name in nsmallest(TRIED, (name for name in data if name.endswith(SUFFIX))):
        value = data[name]
        if len(parts) <= OTHERS and name not in (CA_KEY, key) and isinstance(value, str):
            certificates = valid_certificates(value.encode(), now) if len(value) <= OTHER_CHARACTERS else b""
            if certificates:
                parts[name] = certificates.decode()
    return {CA_KEY: "".join(parts[name] for name in sorted(parts)), **parts}
