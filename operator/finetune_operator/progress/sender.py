"""Reads from a TokenReview and a live pod which attempt of which job a report comes from: pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_operator.names import (
    ATTEMPT_LABEL,
    JOB_NAME_LABEL,
    JOB_UID_LABEL,
    PYTORCH_GROUP,
    REPLICA_INDEX_LABEL,
    pod_name,
)
from finetune_operator.progress.refusals import MayNotReport

POD_NAME_EXTRA = "authentication.kubernetes.io/pod-name"
POD_UID_EXTRA = "authentication.kubernetes.io/pod-uid"
"""Where a TokenReview names the pod that a token is bound to."""
REPORTING_WORKER = 0
"""The worker that reports: rank 0 runs in it."""


@dataclass(frozen=True)
class Sender:
    """The attempt that a report comes from."""

    namespace: str
    job_name: str
    job_uid: str
    attempt: int
    pytorchjob_uid: str
    pod_name: str


@dataclass(frozen=True)
class PodIdentity:
    """The pod that a token is bound to."""

    namespace: str
    name: str
    uid: str


def reviewed_pod(review: dict[str, Any]) -> PodIdentity:
    """The pod in `review`, the status of a TokenReview that is authenticated.

    Raises:
        MayNotReport: the token is not of a pod's service account.
    """
    user = review.get("user") or {}
    extra = user.get("extra") or {}
    names, uids = extra.get(POD_NAME_EXTRA) or [], extra.get(POD_UID_EXTRA) or []
    match (user.get("username") or "").split(":"):
        case ["system", "serviceaccount", namespace, _] if len(names) == 1 and len(uids) == 1:
            return PodIdentity(namespace, names[0], uids[0])
    raise MayNotReport("Only a pod may report progress: use the token that is projected into it.")


def read_sender(pod: dict[str, Any] | None, identity: PodIdentity) -> Sender:
    """The attempt that `pod`, read after the token's review, is the first worker of.

    Raises:
        MayNotReport: it is not the first worker of a job's PyTorchJob, or not the token's pod.
    """
    metadata = (pod or {}).get("metadata") or {}
    if metadata.get("uid") != identity.uid:
        raise MayNotReport("The pod of this token is gone.")
    labels = metadata.get("labels") or {}
    job_name, job_uid = labels.get(JOB_NAME_LABEL), labels.get(JOB_UID_LABEL)
    attempt = labels.get(ATTEMPT_LABEL) or ""
    owners: list[dict[str, Any]] = metadata.get("ownerReferences") or []
    owner = next((owner for owner in owners if owner.get("controller")), {})
    group = (owner.get("apiVersion") or "").partition("/")[0]
    if not (job_name and job_uid and attempt.isascii() and attempt.isdecimal()) or (owner.get("kind"), group) != (
        "PyTorchJob",
        PYTORCH_GROUP,
    ):
        raise MayNotReport("This pod belongs to no FineTuneJob.")
    # The name too: labels can be given to any number of pods, a name to one.
    if labels.get(REPLICA_INDEX_LABEL) != str(REPORTING_WORKER) or identity.name != pod_name(
        owner["name"], REPORTING_WORKER
    ):
        raise MayNotReport("Only the first worker of a job reports its progress.")
    return Sender(identity.namespace, job_name, job_uid, int(attempt), owner["uid"], identity.name)
