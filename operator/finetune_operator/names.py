"""Every label, annotation and object name that the operator writes or looks for.

Names are deterministic, so that an operator that was killed after a create finds what it created, and two operators
that run at once cannot make the same thing twice.
"""

from __future__ import annotations

FINETUNE_GROUP = "finetune.dev"
FINETUNE_VERSION = "v1alpha1"
FINETUNE_PLURAL = "finetunejobs"
PYTORCH_GROUP = "kubeflow.org"
PYTORCH_VERSION = "v1"
PYTORCH_PLURAL = "pytorchjobs"
BATCH_GROUP = "batch"
BATCH_VERSION = "v1"
BATCH_PLURAL = "jobs"
PODS_PLURAL = "pods"

MANAGER = "finetune-operator"
"""Our name in managed-by labels, in events and as the audience of progress tokens."""

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
"""Kubernetes' own label; its value on everything of ours is MANAGER."""
APP_NAME_LABEL = "app.kubernetes.io/name"
"""Kubernetes' own label; `finetune-trainer` on the pods, so that a NetworkPolicy can select them."""
TRAINER_APP = "finetune-trainer"

JOB_NAME_LABEL = "finetune.dev/job-name"
"""Name of the FineTuneJob, on all that belongs to it. An event on any of them names the job by it."""
JOB_UID_LABEL = "finetune.dev/job-uid"
"""uid of the FineTuneJob, on the same objects. Watches select by its presence."""
ATTEMPT_LABEL = "finetune.dev/attempt"
"""Number of the attempt, from 1, on the same objects. A verification belongs to none."""

KUEUE_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Kueue's label. Copied from the FineTuneJob to its PyTorchJob and Job; the pods must not carry it."""
KUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
"""Kueue's label of a WorkloadPriorityClass, copied likewise."""

CONTROLLER_UID_LABEL = "batch.kubernetes.io/controller-uid"
"""Kubernetes' label with the uid of the Job that a pod belongs to."""

REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"
"""The training operator's label with the number of a worker, from 0; the pod reads its node rank from it."""

EVICT_ANNOTATION = "cluster-autoscaler.kubernetes.io/safe-to-evict"
"""The cluster autoscaler's annotation: `false` keeps it from removing a node under a running attempt."""

JOB_FILE_KEY = "job.yaml"
"""Key of an attempt's ConfigMap with the effective job, which the trainer reads."""
SPEC_KEY = "spec.json"
"""Key of an attempt's ConfigMap with what the user wrote below `spec`, to notice changes that CEL cannot refuse."""

PLACEMENT_KEY = "placement.json"
"""Key of an attempt's ConfigMap with what the user wrote about where it runs, to tell that a change has to wait."""

CA_CONFIG_MAP = "finetune-progress-ca"
"""ConfigMap with the certificate that trainers trust the progress endpoint by; one in each namespace with jobs."""
CA_KEY = "ca.crt"
TLS_SECRET = "finetune-operator-tls"
"""Secret with the CA of the progress endpoint, in the operator's own namespace; the only one that it may touch."""

PYTORCH_CONTAINER = "pytorch"
"""Name that the training operator wants of the container that trains."""
VERIFICATION_CONTAINER = "verify"
"""Name of the container that verifies an adapter."""
WORKER_REPLICA = "Worker"

CACHE_VOLUME = "finetune-cache"
SCRATCH_VOLUME = "finetune-scratch"
SHARED_MEMORY_VOLUME = "finetune-shared-memory"
"""Names of a pod's emptyDir volumes: the kubelet names them when one has grown too large."""

UID_CHARACTERS = 8
NAME_CHARACTERS = 36
"""Characters of the job's name in a child's: with uid, attempt and `-worker-1023` they stay below 63."""


def child_name(job_name: str, job_uid: str, attempt: int) -> str:
    """Name of the PyTorchJob and of the ConfigMap of attempt number `attempt`."""
    return f"{stem(job_name, job_uid)}-{attempt}"


def verification_name(job_name: str, job_uid: str) -> str:
    """Name of the Job that verifies the adapter."""
    return f"{stem(job_name, job_uid)}-verify"


def pod_name(child: str, index: int) -> str:
    """Name of worker `index`, from 0, and of the headless service in front of it: the training operator's own."""
    return f"{child}-worker-{index}"


def stem(job_name: str, job_uid: str) -> str:
    """What the names of all that belongs to a job begin with."""
    return f"{job_name[:NAME_CHARACTERS].rstrip('-')}-{job_uid[:UID_CHARACTERS]}"
