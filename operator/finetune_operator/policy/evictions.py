"""Evictions that a pod has only itself to blame for: it wrote more to its node's disk than its own limits allow.

A kubelet says Evicted of these, of pods that it ends because the node is short of something, and of pods that it does
not even take because of that. Only its sentence tells them apart (kubernetes, pkg/kubelet/eviction/helpers.go), and
only the first kind comes back with every attempt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune_operator.names import (
    CACHE_VOLUME,
    PYTORCH_CONTAINER,
    SCRATCH_VOLUME,
    SHARED_MEMORY_VOLUME,
    VERIFICATION_CONTAINER,
)

EVICTED = "Evicted"
"""`status.reason` of a pod, for all three."""

_VOLUME = re.compile(r'Usage of EmptyDir volume "([^"]+)" exceeds the limit "([^"]+)"')
_POD = re.compile(r"Pod ephemeral local storage usage exceeds the total limit of containers (\S+?)\.?(?:\s|$)")
_CONTAINER = re.compile(r'Container (\S+) exceeded its local ephemeral storage limit "([^"]+)"')

_EPHEMERAL = "raise workers.resources.limits.ephemeral-storage"
_VOLUMES: dict[str, tuple[str, str]] = {
    CACHE_VOLUME: (
        "its cache",
        "raise workers.cache.sizeLimit, or name a claim with workers.cache.persistentVolumeClaim",
    ),
    SCRATCH_VOLUME: (
        "its folder for temporary files",
        "have the platform team raise trainer.scratchSize of the operator's chart",
    ),
    SHARED_MEMORY_VOLUME: (
        "its shared memory",
        "have the platform team raise trainer.sharedMemorySize of the operator's chart",
    ),
}


@dataclass(frozen=True)
class DiskLimit:
    """The limit that a pod went over."""

    where: str
    """What was written to, for a sentence."""
    size: str
    """The limit, as a Kubernetes quantity."""
    cure: str
    """What to do, as the rest of a sentence without its full stop; it names the key to raise."""


def exceeded_limit(message: str) -> DiskLimit | None:
    """The limit of its own that a pod was evicted for, from its `status.message`; None when it was not."""
    if found := _VOLUME.search(message):
        return _of_volume(found[1], found[2])
    if found := _POD.search(message):
        return DiskLimit("its node's disk", found[1], _EPHEMERAL)
    if found := _CONTAINER.search(message):
        return _of_container(found[1], found[2])
    return None


def _of_volume(name: str, size: str) -> DiskLimit:
    if name in _VOLUMES:
        where, cure = _VOLUMES[name]
        return DiskLimit(where, size, cure)
    return DiskLimit(f"the emptyDir volume {name}", size, f"raise emptyDir.sizeLimit of {name} in workers.volumes")


def _of_container(name: str, size: str) -> DiskLimit:
    if name in (PYTORCH_CONTAINER, VERIFICATION_CONTAINER):
        return DiskLimit("its container's own disk and log", size, _EPHEMERAL)
    where = f"the disk and log of the container {name}"
    return DiskLimit(where, size, f"have the ephemeral-storage limit of {name} raised by whoever adds it to pods")
