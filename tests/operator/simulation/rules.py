"""What an API server makes of a write: the object as it was and as it is wished in, as it will be out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import orjson

from finetune_operator.errors import api_error
from finetune_operator.policy.times import rfc3339
from finetune_operator.wire import Raw

GRACE_SECONDS = 30
"""Time that a pod on a node has to end, unless it or its deletion says otherwise."""
OVER = ("Succeeded", "Failed")
_SERVER_OWNED = ("name", "namespace", "uid", "creationTimestamp", "generation")
_TIME, _GRACE = "deletionTimestamp", "deletionGracePeriodSeconds"


class Kind(NamedTuple):
    """A kind of objects."""

    api_version: str
    kind: str
    custom: bool = False
    """It has a definition of its own: its generation counts, and whoever replaces it has to say what was read."""
    status: bool = False
    """Its status is written by itself alone."""


KINDS: Mapping[str, Kind] = {
    "finetunejobs": Kind("finetune.dev/v1alpha1", "FineTuneJob", custom=True, status=True),
    "pytorchjobs": Kind("kubeflow.org/v1", "PyTorchJob", custom=True, status=True),
    "jobs": Kind("batch/v1", "Job", status=True),
    "pods": Kind("v1", "Pod", status=True),
    "configmaps": Kind("v1", "ConfigMap"),
    "events": Kind("v1", "Event"),
}
"""Plural -> kind."""


def copied(raw: Any) -> dict[str, Any]:
    """The same, sharing nothing."""
    found: dict[str, Any] = orjson.loads(orjson.dumps(raw))
    return found


def created(kind: Kind, raw: Raw, namespace: str, uid: str, now: datetime) -> Raw:
    """The object that is made of `raw`."""
    metadata = {**raw["metadata"], "namespace": namespace, "uid": uid, "creationTimestamp": rfc3339(now)}
    if kind.custom:
        metadata["generation"] = 1
    made = {**raw, "apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata}
    if kind.status:
        made.pop("status", None)
    if kind.kind == "Pod":
        made["status"] = {"phase": "Pending"}
    return made


def updated(kind: Kind, before: Raw, wished: Raw, part: str) -> Raw:
    """The object that `before` becomes.

    Args:
        kind: of both.
        before: as it is.
        wished: what it is to be replaced by.
        part: `status` to replace that alone, empty to replace all but that.

    Raises:
        ApiError: 409, it was changed since it was read; 422, it was not said what was read.
    """
    old, new = before["metadata"], wished["metadata"]
    if kind.custom and not new.get("resourceVersion"):
        raise api_error(422, "Invalid", "metadata.resourceVersion: must be specified for an update")
    if new.get("resourceVersion", old["resourceVersion"]) != old["resourceVersion"]:
        raise api_error(
            409, "Conflict", "the object has been modified; please apply your changes to the latest version"
        )
    if part == "status" and kind.custom:
        return {**before, "status": wished.get("status", {})}
    kept = {key: old[key] for key in (*_SERVER_OWNED, _TIME, _GRACE) if key in old}
    metadata = {key: value for key, value in new.items() if key not in (_TIME, _GRACE, "generation")} | kept
    if part == "status":  # of a kind of Kubernetes' own takes labels along
        owners = {"ownerReferences": old["ownerReferences"]} if "ownerReferences" in old else {}
        return {**before, "metadata": metadata | owners, "status": wished.get("status", {})}
    after = {**wished, "metadata": metadata, "apiVersion": kind.api_version, "kind": kind.kind}
    if kind.status:
        after.pop("status", None)
        after |= {"status": before["status"]} if "status" in before else {}
    if kind.custom and _content(after) != _content(before):
        metadata["generation"] += 1
    return after


def deleted(kind: Kind, before: Raw, options: Mapping[str, Any], now: datetime) -> Raw | None:
    """What its deletion makes of an object; None where it is gone at once. A pod is always marked before it goes.

    Raises:
        ApiError: 409, it is not the one that was meant.
    """
    metadata = before["metadata"]
    for key, wanted in options.get("preconditions", {}).items():
        if metadata[key] != wanted:
            raise api_error(409, "Conflict", f"Precondition failed: {key} in precondition: {wanted}")
    status, grace = before.get("status") or {}, 0
    if kind.kind == "Pod" and before["spec"].get("nodeName") and status.get("phase") not in OVER:
        own = before["spec"].get("terminationGracePeriodSeconds", GRACE_SECONDS)
        grace = options.get("gracePeriodSeconds", own)
    if kind.kind != "Pod" and not metadata.get("finalizers"):
        return None
    if _GRACE in metadata and grace >= metadata[_GRACE]:
        return before
    going = {_TIME: rfc3339(now + timedelta(seconds=grace)), _GRACE: grace}
    if kind.custom:
        going["generation"] = metadata["generation"] + 1
    return {**before, "metadata": metadata | going}


def is_free_to_go(raw: Raw) -> bool:
    """Whether an object that is being deleted has nothing left that holds it."""
    metadata = raw["metadata"]
    return _TIME in metadata and not metadata[_GRACE] and not metadata.get("finalizers")


def is_garbage(raw: Raw, uids: set[str]) -> bool:
    """Whether an object had owners and none of them is among the objects with those uids."""
    owners = raw["metadata"].get("ownerReferences") or []
    return bool(owners) and _TIME not in raw["metadata"] and not any(owner["uid"] in uids for owner in owners)


def merged(target: Any, patch: Any) -> Any:
    """`target` after a JSON merge patch: null removes, lists are replaced whole."""
    if not isinstance(patch, dict):
        return patch
    found = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found


def _content(raw: Raw) -> Raw:
    return {key: value for key, value in raw.items() if key not in ("metadata", "status", "apiVersion", "kind")}
