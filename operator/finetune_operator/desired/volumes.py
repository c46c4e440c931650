"""Volumes of a worker's pod and where the trainer sees them. The root file system is read-only: all it writes is here.

A claim becomes one volume however often it is used, because a kubelet may wait for ever on a claim that one pod lists
twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.workers import Volume
from finetune_operator.desired.addresses import claims
from finetune_operator.desired.metadata import child_of
from finetune_operator.desired.spelling import plain
from finetune_operator.names import CA_KEY, CACHE_VOLUME, JOB_FILE_KEY, SCRATCH_VOLUME, SHARED_MEMORY_VOLUME
from finetune_operator.settings import OperatorSettings

JOB_FOLDER = "/etc/finetune"
SCRATCH_FOLDER = "/tmp"  # noqa: S108  a volume of the pod's own
SHARED_MEMORY_FOLDER = "/dev/shm"  # noqa: S108  likewise
CACHE_FOLDER = "/var/cache/finetune"
CLAIMS_FOLDER = "/mnt/pvc"
"""Holds a folder per claim of a pvc:// address; the trainer's own default."""
PROGRESS_FOLDER = "/var/run/secrets/finetune.dev/progress"
TOKEN_FILE = "token"

VOLUME_PREFIX = "finetune-"
"""Names of our own volumes begin with it."""

TOKEN_SECONDS = 3600
"""How long a progress token is valid; the kubelet replaces it in time (seconds)."""

_SOURCES = ("configMap", "secret", "emptyDir")
"""What a volume of the job may be besides a claim."""


@dataclass
class PodVolumes:
    """Volumes and mounts in Kubernetes' own form, filled one by one."""

    volumes: list[dict[str, Any]] = field(default_factory=list)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    _claims: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, source: dict[str, Any], path: str, *, read_only: bool = False, sub_path: str = "") -> None:
        """A volume of its own, mounted at `path`."""
        self.volumes.append({"name": name, **source})
        self._mount(name, path, read_only, sub_path)

    def add_claim(self, name: str, claim: str, path: str, *, read_only: bool = False, sub_path: str = "") -> None:
        """`claim` mounted at `path`; its volume is called `name` unless it is there already."""
        volume = self._claims.get(claim)
        if volume is None:
            # readOnly on the claim itself, too: only so can one that is ReadOnlyMany be mounted.
            volume = {"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
            self._claims[claim] = volume
            self.volumes.append(volume)
        if not read_only:
            volume["persistentVolumeClaim"].pop("readOnly", None)
        self._mount(volume["name"], path, read_only, sub_path)

    def _mount(self, name: str, path: str, read_only: bool, sub_path: str) -> None:
        mount: dict[str, Any] = {"name": name, "mountPath": path}
        if read_only:
            mount["readOnly"] = True
        if sub_path:
            mount["subPath"] = sub_path
        self.mounts.append(mount)


def pod_volumes(job: FineTuneJob, attempt: int, settings: OperatorSettings) -> PodVolumes:
    """Volumes of `job`, a result of `effective_job`."""
    return _with_users(own_volumes(job, child_of(job, attempt), settings), job)


def _with_users(found: PodVolumes, job: FineTuneJob) -> PodVolumes:
    for volume in job.spec.workers.volumes:
        _add_users(found, volume)
    return found


def verification_volumes(job: FineTuneJob, attempt: int, settings: OperatorSettings) -> PodVolumes:
    """Volumes of a pod that verifies the adapter of `job`: as of its last attempt, its addresses read-only."""
    quiet = settings.model_copy(update={"progress_url": None})
    return _with_users(own_volumes(job, child_of(job, attempt), quiet, writes=False), job)


def own_volumes(job: FineTuneJob, config_map: str, settings: OperatorSettings, *, writes: bool = True) -> PodVolumes:
    """Those that the job did not ask for with workers.volumes.

    Args:
        job: result of `effective_job`.
        config_map: name of the ConfigMap that holds the job.
        settings: the operator's.
        writes: whether anything is written to the job's addresses.
    """
    found = PodVolumes()
    config = {"name": config_map, "items": [{"key": JOB_FILE_KEY, "path": JOB_FILE_KEY}]}
    found.add(f"{VOLUME_PREFIX}job", {"configMap": config}, JOB_FOLDER, read_only=True)
    found.add(SCRATCH_VOLUME, _empty_dir(size=settings.scratch_size), SCRATCH_FOLDER)
    # Workers hand batches and tensors to each other through it; a container's own has 64 MiB.
    memory = _empty_dir(size=settings.shared_memory_size, medium="Memory")
    found.add(SHARED_MEMORY_VOLUME, memory, SHARED_MEMORY_FOLDER)
    cache = job.spec.workers.cache
    if cache is not None and cache.persistent_volume_claim is not None:
        found.add_claim(CACHE_VOLUME, cache.persistent_volume_claim.claim_name, CACHE_FOLDER)
    else:
        size = cache.size_limit if cache is not None else None
        found.add(CACHE_VOLUME, _empty_dir(size=size), CACHE_FOLDER)
    if settings.progress_url:
        found.add(f"{VOLUME_PREFIX}progress", _progress(settings), PROGRESS_FOLDER, read_only=True)
    for index, (claim, written) in enumerate(claims(job).items()):
        # A claim's name may be longer than a volume's.
        read_only = not (written and writes)
        found.add_claim(f"{VOLUME_PREFIX}claim-{index}", claim, f"{CLAIMS_FOLDER}/{claim}", read_only=read_only)
    return found


def _progress(settings: OperatorSettings) -> dict[str, Any]:
    """What the progress endpoint is told apart and trusted by.

    No mode is set: the kubelet makes the token readable for the pod's user or fsGroup alone where it knows one, and
    for the whole pod (one container) where the cluster chooses.
    """
    token = {"audience": settings.progress_audience, "expirationSeconds": TOKEN_SECONDS, "path": TOKEN_FILE}
    certificate = {
        "name": settings.ca_config_map,
        "items": [{"key": CA_KEY, "path": CA_KEY}],
        # Progress is never worth a training run: without the certificate nothing is reported, and that is all.
        "optional": True,
    }
    return {"projected": {"sources": [{"serviceAccountToken": token}, {"configMap": certificate}]}}


def _empty_dir(*, size: int | str | None, medium: str | None = None) -> dict[str, Any]:
    wishes = {"medium": medium, "sizeLimit": size}
    return {"emptyDir": {key: value for key, value in wishes.items() if value is not None}}


def is_read_only(volume: Volume) -> bool:
    """Whether nothing can be written to it."""
    claim = volume.persistent_volume_claim
    return bool(volume.read_only or volume.config_map or volume.secret or (claim is not None and claim.read_only))


def _add_users(found: PodVolumes, volume: Volume) -> None:
    read_only, sub_path = is_read_only(volume), volume.sub_path or ""
    claim = volume.persistent_volume_claim
    if claim is not None:
        found.add_claim(volume.name, claim.claim_name, volume.mount_path, read_only=read_only, sub_path=sub_path)
        return
    source = {kind: value for kind, value in plain(volume).items() if kind in _SOURCES}
    found.add(volume.name, source, volume.mount_path, read_only=read_only, sub_path=sub_path)
