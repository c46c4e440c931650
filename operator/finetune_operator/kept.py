"""What is kept of a FineTuneJob between two reconciles: what is decided by, however much its author wrote into it.

Labels, annotations and a spec that nothing is made of take 1.4 MB, which become 15 MB of Python's objects. Before
everything is known at a start, and while many wait for their turn, those of all jobs would be held at once.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.decoding import Garbled, encoded
from finetune_operator.names import KUEUE_PRIORITY_LABEL, KUEUE_QUEUE_LABEL
from finetune_operator.wire import Raw

SPEC_BYTES = 16 * 1024
"""A spec of more than that, as JSON, is read again when it is its job's turn; real ones take 2 KiB."""
_METADATA = ("namespace", "name", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")


def kept(raw: Raw) -> Raw:
    """Of a FineTuneJob as it was read: what is kept, its spec only where it is small."""
    found: Raw = {key: raw[key] for key in ("apiVersion", "kind", "spec", "status") if key in raw}
    if not _is_small(raw.get("spec")):
        found.pop("spec", None)
    return {**found, "metadata": kept_metadata(raw)}


def kept_metadata(raw: Raw) -> dict[str, Any]:
    """Of a FineTuneJob: what anything is decided by, or made of."""
    metadata = {key: raw["metadata"][key] for key in _METADATA if key in raw["metadata"]}
    labels = queue_labels(raw)
    return {**metadata, "labels": labels} if labels else metadata


def queue_labels(raw: Raw) -> dict[str, str]:
    """Those labels of a job that are copied to its PyTorchJob."""
    labels = raw["metadata"].get("labels") or {}
    return {key: labels[key] for key in (KUEUE_QUEUE_LABEL, KUEUE_PRIORITY_LABEL) if key in labels}


def _is_small(spec: Any) -> bool:
    try:
        return len(encoded(spec)) <= SPEC_BYTES
    except Garbled:
        return False
