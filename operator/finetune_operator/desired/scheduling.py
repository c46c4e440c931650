"""Where the pods of a job may and had better run: what its author wrote, with a wish of the operator's beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_api.affinity import Affinity
from finetune_api.workers import Workers
from finetune_operator.desired.spelling import plain

AVOIDANCE_WEIGHT = 100
"""The most that a wish can weigh among the scheduler's."""

_WISHES = "preferredDuringSchedulingIgnoredDuringExecution"


def placement_of(workers: Workers, avoid: Sequence[str]) -> dict[str, Any]:
    """The part of a pod's spec that says where it runs, without what is empty.

    Args:
        workers: the job's.
        avoid: names of nodes that others are preferred to.
    """
    chosen = {
        "imagePullSecrets": [plain(secret) for secret in workers.image_pull_secrets],
        "nodeSelector": dict(workers.node_selector),
        "tolerations": [plain(toleration) for toleration in workers.tolerations],
        "affinity": _avoiding(workers.affinity, avoid),
        "priorityClassName": workers.priority_class_name,
        "runtimeClassName": workers.runtime_class_name,
    }
    return {key: value for key, value in chosen.items() if value}


def _avoiding(affinity: Affinity | None, avoid: Sequence[str]) -> dict[str, Any]:
    """`affinity` with a wish for other nodes than these, added to those that it has."""
    written = plain(affinity) if affinity is not None else {}
    if not avoid:
        return written
    of_nodes = written.get("nodeAffinity") or {}
    # A node is known by its name; the label kubernetes.io/hostname is another thing in some clouds. A requirement may
    # have one name only, and all of a term hold together.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in avoid]
    other = {"weight": AVOIDANCE_WEIGHT, "preference": {"matchFields": fields}}
    return {**written, "nodeAffinity": {**of_nodes, _WISHES: [*(of_nodes.get(_WISHES) or []), other]}}
