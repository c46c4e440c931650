"""kstatus' rules for kinds that it does not know: what Flux and Helm 4 see of a FineTuneJob.

After pkg/kstatus/status/generic.go and status.go of sigs.k8s.io/cli-utils, with its words.
"""

from __future__ import annotations

from tests.cluster.api import Object, has_condition

IN_PROGRESS, FAILED, CURRENT, TERMINATING = "InProgress", "Failed", "Current", "Terminating"


def kstatus(found: Object) -> str:
    """What has become of an object."""
    if found["metadata"].get("deletionTimestamp"):
        return TERMINATING
    if is_behind(found):
        return IN_PROGRESS
    if has_condition(found, "Reconciling"):
        return IN_PROGRESS
    if has_condition(found, "Stalled"):
        return FAILED
    return CURRENT


def is_behind(found: Object) -> bool:
    """Whether status is about another generation than the object has."""
    observed = found.get("status", {}).get("observedGeneration")
    return observed is not None and observed != found["metadata"].get("generation")
