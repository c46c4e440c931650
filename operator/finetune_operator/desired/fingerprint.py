"""A digest of what we made of a PyTorchJob, by which an edit by hand is noticed.

What Kueue changes at admission (placement, labels, suspension) is left out, and so is everything outside the spec.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from finetune_operator.names import WORKER_REPLICA

FINGERPRINT_ANNOTATION = "finetune.dev/fingerprint"
"""Annotation of a PyTorchJob with the fingerprint of its spec as it was created."""

_KUEUES = ("nodeSelector", "tolerations", "schedulingGates", "affinity", "priorityClassName")


def fingerprint(pytorch_job: Mapping[str, Any]) -> str:
    """Digest of replicas and pod spec."""
    try:
        worker = pytorch_job["spec"]["pytorchReplicaSpecs"][WORKER_REPLICA]
        pod = {key: value for key, value in worker["template"]["spec"].items() if key not in _KUEUES}
        made = {"replicas": worker.get("replicas"), "restartPolicy": worker.get("restartPolicy"), "pod": pod}
    except (KeyError, TypeError, AttributeError):
        made = {}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def is_edited(pytorch_job: Mapping[str, Any]) -> bool:
    """Whether it is no longer what we made."""
    annotations = (pytorch_job.get("metadata") or {}).get("annotations") or {}
    recorded = annotations.get(FINGERPRINT_ANNOTATION)
    return recorded is not None and recorded != fingerprint(pytorch_job)
