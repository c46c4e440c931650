"""A pod that was evicted for its own limit is told from one that a node could not keep, by the kubelet's sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_operator.policy.evictions import exceeded_limit
from finetune_operator.policy.observed import PodView, read_pod
from tests.operator.desired.built import SETTINGS, pod, stored


def volume(name: str, limit: str) -> str:
    """The kubelet's emptyDirMessageFmt; Go's %q is JSON's for these."""
    return f"Usage of EmptyDir volume {json.dumps(name)} exceeds the limit {json.dumps(limit)}. "


def container(name: str, limit: str) -> str:
    """Its containerEphemeralStorageMessageFmt."""
    return f"Container {name} exceeded its local ephemeral storage limit {json.dumps(limit)}. "


def whole_pod(limit: str) -> str:
    """Its podEphemeralStorageMessageFmt."""
    return f"Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "


OWN = {
    volume("finetune-cache", "100Gi"): ("its cache", "100Gi", "workers.cache.sizeLimit"),
    volume("finetune-scratch", "20Gi"): ("its folder for temporary files", "20Gi", "trainer.scratchSize"),
    volume("finetune-shared-memory", "1Gi"): ("its shared memory", "1Gi", "trainer.sharedMemorySize"),
    volume("data", "30M"): ("the emptyDir volume data", "30M", "emptyDir.sizeLimit of data in workers.volumes"),
    whole_pod("1.5Gi"): ("its node's disk", "1.5Gi", "workers.resources.limits.ephemeral-storage"),
    whole_pod("10Gi").strip(): ("its node's disk", "10Gi", "workers.resources.limits.ephemeral-storage"),
    whole_pod("10Gi").strip(". "): ("its node's disk", "10Gi", "workers.resources.limits.ephemeral-storage"),
    container("pytorch", "2Gi"): ("its container's own disk", "2Gi", "workers.resources.limits.ephemeral-storage"),
    container("verify", "2Gi"): ("its container's own disk", "2Gi", "workers.resources.limits.ephemeral-storage"),
    container("istio-proxy", "1Gi"): ("the container istio-proxy", "1Gi", "by whoever adds it to pods"),
}
NODES = [
    (
        "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 9Gi. Container "
        "pytorch was using 80Gi, request is 0, has larger consumption of ephemeral-storage. "
    ),
    "The node was low on resource: memory. ",
    "Pod was rejected: The node had condition: [DiskPressure]. ",
    "The node had condition: [MemoryPressure]. ",
    "",
]


def evicted(message: str, **status: Any) -> PodView:
    """As the kubelet leaves it."""
    found = {"phase": "Failed", "reason": "Evicted", "message": message, **status}
    return read_pod({"metadata": {"name": "p"}, "status": found})


@pytest.mark.parametrize("message", OWN)
def test_a_limit_of_its_own_is_named_with_the_key_to_raise(message: str) -> None:
    where, size, key = OWN[message]
    found = exceeded_limit(message)
    assert found is not None
    assert where in found.where
    assert found.size == size
    assert key in found.cure
    assert evicted(message).disk_limit == found
    assert evicted(message).disruption is None


@pytest.mark.parametrize("message", NODES)
def test_what_a_node_is_short_of_is_nobodys_fault(message: str) -> None:
    found = evicted(message)
    assert found.disk_limit is None
    assert (found.disruption or "").startswith("Evicted")


def test_the_sentence_counts_only_beside_the_kubelets_word() -> None:
    """A container's own last words could say the same."""
    found = evicted(volume("finetune-cache", "1Gi"), reason="Error")
    assert (found.disk_limit, found.disruption) == (None, None)


def test_it_counts_as_soon_as_the_kubelet_says_it() -> None:
    """The pod's containers end before its phase does; until then the exit code of the kill must not be judged."""
    assert evicted(volume("finetune-cache", "1Gi"), phase="Running").disk_limit is not None


def test_the_volumes_are_those_that_a_pod_has() -> None:
    names = {item["name"] for item in pod(stored(), SETTINGS)["volumes"] if "emptyDir" in item}
    assert {name for name in names if "in workers.volumes" in exceeded_limit(volume(name, "1Gi")).cure} == set()  # type: ignore[union-attr]
