"""A digest of what we made of a PyTorchJob, by which an edit by hand is noticed.

What Kueue changes at admission (placement, labels, suspension) is left out, and so is everything outside the spec.
Its webhook also writes the whole object anew, as every one in Go does: what means the same has the same digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from finetune_operator.names import WORKER_REPLICA

FINGERPRINT_ANNOTATION = "finetune.dev/fingerprint"
"""Annotation of a PyTorchJob with the fingerprint of its spec as it was created."""

_SCHEME = "2-"
"""What a fingerprint begins with. One that was made in another way tells nothing."""
_KUEUES = ("nodeSelector", "tolerations", "schedulingGates", "affinity", "priorityClassName")
_QUANTITIES = ("limits", "requests", "sizeLimit")
_QUANTITY = re.compile(r"([+-]?\d+(?:\.\d+)?)([numkMGTPE]|[KMGTPE]i)?", re.ASCII)
_UNITS = {
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("n", "u", "m", "", "k", *"MGTPE"), start=-3)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}


def fingerprint(pytorch_job: Mapping[str, Any]) -> str:
    """Digest of replicas and pod spec."""
    try:
        worker = pytorch_job["spec"]["pytorchReplicaSpecs"][WORKER_REPLICA]
        pod = {key: value for key, value in worker["template"]["spec"].items() if key not in _KUEUES}
        made = {"replicas": worker.get("replicas"), "restartPolicy": worker.get("restartPolicy"), "pod": _meaning(pod)}
    except (KeyError, TypeError, AttributeError):
        made = {}
    return _SCHEME + hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def is_edited(pytorch_job: Mapping[str, Any]) -> bool:
    """Whether it is no longer what we made."""
    annotations = (pytorch_job.get("metadata") or {}).get("annotations") or {}
    recorded = str(annotations.get(FINGERPRINT_ANNOTATION))  # "None" is of no scheme
    return recorded.startswith(_SCHEME) and recorded != fingerprint(pytorch_job)


def _meaning(value: Any, *, quantities: bool = False) -> Any:
    """`value` without what is as good as absent, and with amounts for `quantities`."""
    if isinstance(value, Mapping):
        inner = {name: _meaning(item, quantities=quantities or name in _QUANTITIES) for name, item in value.items()}
        return {name: item for name, item in inner.items() if item is not False and item not in (None, "", [], {})}
    if isinstance(value, list):
        return [_meaning(item) for item in value]
    return _amount(value) if quantities else value


def _amount(quantity: Any) -> str:
    """How much it is, in the same words for 1, "1" and "1000m"."""
    text = str(quantity)
    match = _QUANTITY.fullmatch(text)
    if match is None:  # nothing of ours
        return text
    number, unit = match.groups()
    return str((Decimal(number) * _UNITS[unit or ""]).normalize())
