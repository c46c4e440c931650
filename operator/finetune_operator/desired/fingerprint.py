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

from finetune_api.spec_size import SPEC_LIMIT_VALUES, has_more_values
from finetune_operator.names import WORKER_REPLICA

FINGERPRINT_ANNOTATION = "finetune.dev/fingerprint"
"""Annotation of a PyTorchJob with the fingerprint of its spec as it was created."""

_SCHEME = "2-"
"""What a fingerprint begins with. One that was made in another way tells nothing."""
_KUEUES = ("nodeSelector", "tolerations", "schedulingGates", "affinity", "priorityClassName")
_QUANTITIES = ("limits", "requests", "sizeLimit")
_QUANTITY = re.compile(r"([+-]?\d+(?:\.\d+)?)([numkMGTPE]|[KMGTPE]i)?", re.ASCII)
_QUANTITY_CHARACTERS = 64
"""Of the longest text that is taken for a quantity, twice as long as a job's may be: nobody reckons with a million
digits."""
_UNITS = {
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("n", "u", "m", "", "k", *"MGTPE"), start=-3)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}


def fingerprint(pytorch_job: Mapping[str, Any]) -> str:
    """Digest of replicas and pod spec."""
    return _digest(_made(pytorch_job))


def is_edited(pytorch_job: Mapping[str, Any]) -> bool:
    """Whether it is no longer what we made.

    Whoever may edit it can fill it with all that the API server takes, such as hundreds of thousands of empty lists.
    What we make never has more values than a spec may have, so of what has more no more are looked at.
    """
    annotations = (pytorch_job.get("metadata") or {}).get("annotations") or {}
    recorded = str(annotations.get(FINGERPRINT_ANNOTATION))  # "None" is of no scheme
    if not recorded.startswith(_SCHEME):
        return False
    made = _made(pytorch_job)
    try:
        return has_more_values(made, SPEC_LIMIT_VALUES) or recorded != _digest(made)
    except RecursionError:  # nor is anything of ours nested so deeply
        return True


def _made(pytorch_job: Mapping[str, Any]) -> dict[str, Any]:
    """What its fingerprint is taken of; nothing where it is no PyTorchJob as we make them."""
    try:
        worker = pytorch_job["spec"]["pytorchReplicaSpecs"][WORKER_REPLICA]
        pod = {**worker["template"]["spec"]}
        for key in _KUEUES:
            pod.pop(key, None)
        return {"replicas": worker.get("replicas"), "restartPolicy": worker.get("restartPolicy"), "pod": pod}
    except (KeyError, TypeError, AttributeError):
        return {}


def _digest(made: Mapping[str, Any]) -> str:
    compared = {**made, "pod": _meaning(made["pod"])} if made else {}
    return _SCHEME + hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]


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
    match = _QUANTITY.fullmatch(text) if len(text) <= _QUANTITY_CHARACTERS else None
    if match is None:  # nothing of ours
        return text
    number, unit = match.groups()
    return str((Decimal(number) * _UNITS[unit or ""]).normalize())
