"""Environment of a container: how workers find each other, what may be written, and credentials by reference.

The training operator appends PET_NNODES and PET_NPROC_PER_NODE by itself, and nothing else for workers alone. The names
are the trainer's (a test compares them): operator and trainer do not import each other.
"""

from __future__ import annotations

from typing import Any

from finetune_api.job import FineTuneJob, Secrets
from finetune_api.workers import Workers
from finetune_operator.desired.metadata import child_of
from finetune_operator.desired.spelling import plain
from finetune_operator.desired.volumes import CACHE_FOLDER, CLAIMS_FOLDER, PROGRESS_FOLDER, SCRATCH_FOLDER, TOKEN_FILE
from finetune_operator.names import CA_KEY, REPLICA_INDEX_LABEL, pod_name
from finetune_operator.settings import OperatorSettings

MASTER_PORT = 23456
"""Port of worker 0 at which the workers meet: the training operator's own choice."""

TERMINATION_MESSAGE_PATH = "/dev/termination-log"

LAUNCHER_MARGIN_SECONDS = 5
"""What the launcher needs after its workers to say how the attempt ended, of the pod's grace period (seconds)."""

STORE_KEYS_REQUIRED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
STORE_KEYS_OPTIONAL = (
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
)
"""Keys of the Secret behind secrets.objectStore; each becomes the variable of its name."""

STORE_CREDENTIALS = (*STORE_KEYS_REQUIRED, "AWS_SESSION_TOKEN")

HUB_TOKEN = "HF_TOKEN"
HUB_TOKENS = (HUB_TOKEN, "HUGGING_FACE_HUB_TOKEN")
DEFAULT_HUB_KEY = "token"
"""Key of the operator's own choice of Secret that holds the token."""


def processes_per_node(workers: Workers) -> int:
    """Worker processes in a pod: one per GPU, and one on a machine without."""
    return max(workers.gpus_per_node, 1)


def environment(job: FineTuneJob, attempt: int, settings: OperatorSettings) -> list[dict[str, Any]]:
    """The container's variables, the job's own last; a name is never there twice.

    Args:
        job: result of `effective_job`.
        attempt: number of the attempt, from 1.
        settings: the operator's.
    """
    workers = job.spec.workers
    own = [
        *_group(job, attempt),
        *_launcher(workers, settings),
        *_last_words(workers),
        *_folders(),
        *_progress(settings),
    ]
    return _with_users(own, job, settings)


def verification_environment(job: FineTuneJob, settings: OperatorSettings) -> list[dict[str, Any]]:
    """Variables of the container that verifies the adapter of `job`: it is alone, and nobody hears its progress."""
    return _with_users([*_last_words(job.spec.workers), *_folders()], job, settings)


def _with_users(own: list[dict[str, Any]], job: FineTuneJob, settings: OperatorSettings) -> list[dict[str, Any]]:
    users = [plain(variable) for variable in job.spec.workers.env]
    given = {variable["name"] for variable in users}
    own = own + _credentials(job.spec.secrets, given, settings)
    return [variable for variable in own if variable["name"] not in given] + users


def _group(job: FineTuneJob, attempt: int) -> list[dict[str, Any]]:
    rank = {"fieldRef": {"fieldPath": f"metadata.labels['{REPLICA_INDEX_LABEL}']"}}
    return [
        {"name": "PET_NODE_RANK", "valueFrom": rank},
        _value("PET_MASTER_ADDR", pod_name(child_of(job, attempt), 0)),
        _value("PET_MASTER_PORT", MASTER_PORT),
    ]


def _launcher(workers: Workers, settings: OperatorSettings) -> list[dict[str, Any]]:
    variables: dict[str, str | int] = {
        "FINETUNE_NPROC_PER_NODE": processes_per_node(workers),
        "FINETUNE_EXPECTED_WORLD_SIZE": workers.world_size,
        "FINETUNE_GRACE_SECONDS": settings.termination_grace_seconds - LAUNCHER_MARGIN_SECONDS,
    }
    return [_value(name, value) for name, value in variables.items()]


def _last_words(workers: Workers) -> list[dict[str, Any]]:
    variables = [_value("FINETUNE_TERMINATION_MESSAGE_PATH", TERMINATION_MESSAGE_PATH)]
    if not workers.gpus_per_node:
        # Where the container runtime shows every GPU to everybody, a job for the CPU must not take one.
        variables.append(_value("CUDA_VISIBLE_DEVICES", ""))
    return variables


def _folders() -> list[dict[str, Any]]:
    variables = {
        "FINETUNE_CACHE_DIR": CACHE_FOLDER,
        "FINETUNE_PVC_ROOT": CLAIMS_FOLDER,
        "HF_HOME": f"{CACHE_FOLDER}/huggingface",
        "HOME": SCRATCH_FOLDER,
        "TMPDIR": SCRATCH_FOLDER,
        # Libraries ask for the user's name to name a folder, and raise when the image does not know the user.
        "USER": "trainer",
        # Images may have set these to folders of their own, which cannot be written here.
        "XDG_CACHE_HOME": f"{SCRATCH_FOLDER}/.cache",
        "MPLCONFIGDIR": f"{SCRATCH_FOLDER}/matplotlib",
        "TORCHINDUCTOR_CACHE_DIR": f"{SCRATCH_FOLDER}/torchinductor",
        "TRITON_CACHE_DIR": f"{SCRATCH_FOLDER}/triton",
    }
    return [_value(name, value) for name, value in variables.items()]


def _progress(settings: OperatorSettings) -> list[dict[str, Any]]:
    if not settings.progress_url:
        return []
    return [
        _value("KUBEFLOW_TRAINER_SERVER_URL", settings.progress_url),
        _value("KUBEFLOW_TRAINER_SERVER_TOKEN", f"{PROGRESS_FOLDER}/{TOKEN_FILE}"),
        _value("KUBEFLOW_TRAINER_SERVER_CA_CERT", f"{PROGRESS_FOLDER}/{CA_KEY}"),
    ]


def _credentials(secrets: Secrets, given: set[str], settings: OperatorSettings) -> list[dict[str, Any]]:
    """Those that the job names; else the operator's, unless the job's own variables bring some.

    A Secret of the operator's choice may be missing in the job's namespace: public models need no token.
    """
    hub, store = secrets.hugging_face, secrets.object_store
    variables = []
    if hub is not None:
        variables.append(_secret(HUB_TOKEN, hub.name, hub.key))
    elif settings.hugging_face_secret and given.isdisjoint(HUB_TOKENS):
        variables.append(_secret(HUB_TOKEN, settings.hugging_face_secret, DEFAULT_HUB_KEY, optional=True))
    if store is not None:
        variables += [_secret(key, store.name, key) for key in STORE_KEYS_REQUIRED]
        variables += [_secret(key, store.name, key, optional=True) for key in STORE_KEYS_OPTIONAL]
    elif settings.object_store_secret and given.isdisjoint(STORE_CREDENTIALS):
        name = settings.object_store_secret
        variables += [_secret(key, name, key, optional=True) for key in (*STORE_KEYS_REQUIRED, *STORE_KEYS_OPTIONAL)]
    return variables


def _value(name: str, value: str | int) -> dict[str, Any]:
    return {"name": name, "value": str(value)}


def _secret(variable: str, secret: str, key: str, *, optional: bool = False) -> dict[str, Any]:
    reference: dict[str, Any] = {"name": secret, "key": key, **({"optional": True} if optional else {})}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}
