"""Environment variables that a job may not set in a cluster, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.job import FineTuneJobSpec
from finetune_api.problem import Problem
from finetune_operator.desired.environment import HUB_TOKENS, STORE_CREDENTIALS

_CACHE = "models and tokenized data are kept where workers.cache says: remove it here and write workers.cache."
_GROUP = "workers are numbered and brought together from workers.nodes and workers.gpusPerNode: remove it."
_FOLDER = "only the operator's own folders can be written in a pod, and it is set to one of them: remove it."

_NAMES = {
    "FINETUNE_CACHE_DIR": _CACHE,
    "HF_HOME": _CACHE,
    "HOME": _FOLDER,
    "TMPDIR": _FOLDER,
    **dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), _GROUP),
    **dict.fromkeys(("MASTER_ADDR", "MASTER_PORT"), _GROUP),
}
_PREFIXES = {
    "PET_": _GROUP,
    "FINETUNE_": "the operator sets the launcher's variables itself: remove it.",
    "KUBEFLOW_TRAINER_SERVER_": "the operator itself says where progress is reported: remove it.",
}


def environment_problems(spec: FineTuneJobSpec) -> Iterator[Problem]:
    """A sentence for each variable of workers.env that cannot be set; paths start at the top of the job."""
    names = [variable.name for variable in spec.workers.env]
    for index, name in enumerate(names):
        path = f"spec.workers.env[{index}]"
        sentence = _refusal(name, spec)
        if sentence is not None:
            yield Problem(path, f"{name} cannot be set in a cluster, since {sentence}")
        elif names.index(name) != index:
            yield Problem(path, f"{name} is given twice: remove one.")


def _refusal(name: str, spec: FineTuneJobSpec) -> str | None:
    if name in _NAMES:
        return _NAMES[name]
    for prefix, sentence in _PREFIXES.items():
        if name.startswith(prefix):
            return sentence
    if name in HUB_TOKENS and spec.secrets.hugging_face is not None:
        return "secrets.huggingFace gives the token: remove one of the two."
    if name in STORE_CREDENTIALS and spec.secrets.object_store is not None:
        return "secrets.objectStore gives the credentials: remove one of the two."
    return None
