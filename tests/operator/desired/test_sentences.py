"""Every sentence about a job in this cluster, whole: why it cannot be done, and what its author should know.

After a change, `python -m tests.operator.desired.test_sentences` writes sentences.txt anew; read what became of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_operator.desired import cluster_notices, job_problems
from finetune_operator.settings import OperatorSettings
from tests.operator.desired.built import SETTINGS, stored

FILE = Path(__file__).parent / "sentences.txt"
NO_OUTPUT = SETTINGS.model_copy(update={"default_output_uri": None})
A100 = SETTINGS.model_copy(update={"accelerator_node_selectors": {"A100": {"gpu": "a100"}}})
CACHED = SETTINGS.model_copy(update={"cache_claim": "models"})

DATA: dict[str, Any] = {"name": "data", "mountPath": "/data", "persistentVolumeClaim": {"claimName": "data"}}
MORE = DATA | {"name": "more", "mountPath": "/more"}
ROOM: dict[str, Any] = {"name": "room", "mountPath": "/room", "emptyDir": {}}
ALL_READ_ONLY = {"persistentVolumeClaim": {"claimName": "results", "readOnly": True}}
ON_A_CLAIM = {"uri": "pvc://results/out"}
TWO_NODES = {"nodes": 2, "gpusPerNode": 1}


def mounted(*volumes: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A spec with these volumes."""
    return {"workers": {"volumes": list(volumes)}, **spec}


def cached(**source: Any) -> dict[str, Any]:
    """Workers with a cache on that claim."""
    return {"cache": {"persistentVolumeClaim": source}}


def variables(*names: str) -> dict[str, Any]:
    """A spec with variables by reference, since names such as HF_TOKEN are refused as plain values already."""
    source = {"secretKeyRef": {"name": "own", "key": "key"}}
    return {"workers": {"env": [{"name": name, "valueFrom": source} for name in names]}}


RESERVED = (
    *("FINETUNE_CACHE_DIR", "HF_HOME", "HOME", "TMPDIR", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES"),
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("FINETUNE_ANYTHING", "KUBEFLOW_TRAINER_SERVER_URL"),
)
HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
STORE = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SECRETS = {"huggingFace": {"name": "hub"}, "objectStore": {"name": "store"}}

SPECS: Mapping[str, dict[str, Any]] = {
    "nothing is wrong": {},
    # Where data lies, and where the adapter goes.
    "a relative path": {"train_path": "data/train.jsonl"},
    "a relative path beside a volume of its name": mounted(DATA, train_path="data/train.jsonl"),
    "paths that no volume holds": {
        "train_path": "/data/train.jsonl",
        "valid_path": "file:///x/valid.jsonl",
        "model_id": "/models/base",
        "initial_base_model_ckpt_path": "/models/later",
        "initial_adapter_model_ckpt_path": "./adapter",
        "output": {"uri": "/out"},
        "generation_config": {"prompt_format": {"use_hugging_face_chat_template": True}},
    },
    "an output in LLMForge's spelling": {"output_dir": "/out"},
    "an input, and an output in LLMForge's spelling": {
        "train_path": "/data/train.jsonl",
        "output_dir": "s3://models/x",
    },
    "a volume of a longer name": mounted(DATA | {"mountPath": "/database"}, train_path="/data/t.jsonl"),
    "a folder of a longer name": mounted(DATA, train_path="/database/t.jsonl"),
    "a volume of another spelling": mounted(DATA | {"mountPath": "/data/"}, train_path="/x/../data//t.jsonl"),
    "a way out of the volume": mounted(DATA, train_path="/data/../t.jsonl"),
    "an input on a claim": mounted(DATA, train_path="/data/train.jsonl", output={"uri": "/data/out"}),
    "an input on an emptyDir": mounted(ROOM, train_path="/room/train.jsonl"),
    "an output on an emptyDir": mounted(ROOM, output={"uri": "/room/out"}),
    "an emptyDir in a claim": mounted(
        DATA, ROOM | {"mountPath": "/data/./room/"}, train_path="/data/room/t.jsonl", valid_path="/data/v.jsonl"
    ),
    "a claim in an emptyDir": mounted(
        DATA | {"mountPath": "/room/data"}, ROOM | {"mountPath": "/room/.//./../room/"}, train_path="/room/data/t.jsonl"
    ),
    "an output on a mount that is read-only": mounted(DATA | {"readOnly": True}, output={"uri": "/data/out"}),
    "an input on a mount that is read-only": mounted(DATA | {"readOnly": True}, train_path="/data/train.jsonl"),
    "an output on a ConfigMap": mounted(
        {"name": "config", "mountPath": "/config", "configMap": {"name": "config"}}, output={"uri": "/config/out"}
    ),
    "an output on a Secret": mounted(
        {"name": "keys", "mountPath": "/keys", "secret": {"secretName": "keys"}}, output={"uri": "/keys/out"}
    ),
    "hub names and a claim": {"train_path": "hf://datasets/a/b/c.jsonl", "output": ON_A_CLAIM},
    # Claims.
    "a cache that is read-only": {"workers": cached(claimName="models", readOnly=True)},
    "a claim of the output that is read-only": mounted(DATA, MORE | ALL_READ_ONLY, output=ON_A_CLAIM),
    "a claim of inputs that is read-only": mounted(DATA | ALL_READ_ONLY, train_path="pvc://results/t.jsonl"),
    "a claim of inputs and of the output that is read-only": mounted(
        DATA | ALL_READ_ONLY, valid_path="pvc://results/v.jsonl", output=ON_A_CLAIM
    ),
    "a claim of the cache that is read-only": {
        "workers": {**cached(claimName="results"), "volumes": [DATA | ALL_READ_ONLY]}
    },
    # Volumes.
    "a name of the operator's": mounted(DATA | {"name": "finetune-data"}),
    "a volume in a folder of ours": mounted(DATA | {"mountPath": "/dev/shm/x"}),  # noqa: S108
    "a volume over a folder of ours": mounted(DATA | {"mountPath": "/etc/"}),
    "a volume at a folder of ours": mounted(DATA | {"mountPath": "/etc/./finetune"}),
    "a volume over the folder of claims": mounted(DATA | {"mountPath": "/mnt"}, train_path="pvc://data/t.jsonl"),
    "a volume at the root": mounted(DATA | {"mountPath": "/"}),
    "volumes with slashes to spare": mounted(
        *(DATA | {"name": f"v{number}", "mountPath": path} for number, path in enumerate(("//", "//tmp", "//proc/x"))),
    ),
    "a volume beside the folders of ours": mounted(DATA | {"mountPath": "/mnt"}),
    "volumes of the kernel": mounted(
        *(DATA | {"name": f"v{number}", "mountPath": path} for number, path in enumerate(("/proc", "/sys/x", "/dev/y")))
    ),
    "one path twice": mounted(
        DATA,
        MORE,
        *(DATA | {"name": name, "mountPath": path} for name, path in (("a", "/x/../data/"), ("b", "//data"))),
    ),
    "subPaths that leave their volume": mounted(
        DATA | {"subPath": "../x"}, MORE | {"subPath": "/x"}, ROOM | {"subPath": "x/.."}
    ),
    "subPaths that do not": mounted(DATA | {"subPath": "a/b"}, MORE | {"subPath": "..x"}),
    # Variables.
    **{f"the variable {name}": variables(name) for name in RESERVED},
    "credentials by variables": variables(*HUB, *STORE),
    "credentials by variables and by Secrets": {**variables(*HUB, *STORE), "secrets": SECRETS},
    "a variable twice": variables("A", "B", "A"),
    # What its author should know.
    "an accelerator without a node selector": {"worker_resources": {"accelerator_type:H100": 1, "memory": 1}},
    "two nodes": {"workers": TWO_NODES},
    "two nodes and claims": {
        "train_path": "pvc://data/train.jsonl",
        "output": ON_A_CLAIM,
        "workers": {
            **TWO_NODES,
            **cached(claimName="models"),
            "volumes": [DATA, ROOM, MORE | {"persistentVolumeClaim": {"claimName": "more"}}],
        },
    },
    "two nodes and a cache on disk": {"workers": {**TWO_NODES, "cache": {"sizeLimit": "1Gi"}}},
    "one node and claims": mounted(DATA, train_path="pvc://data/train.jsonl"),
}
"""Name of a situation -> the spec of its job."""
OTHER_SETTINGS: Mapping[str, tuple[OperatorSettings, dict[str, Any]]] = {
    "no output and no default": (NO_OUTPUT, {}),
    "an accelerator with a node selector": (A100, {"worker_resources": {"accelerator_type:A100": 1}}),
    "a claim of the platform's cache that is read-only": (
        CACHED,
        mounted(DATA | {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}),
    ),
    "two nodes and the platform's cache": (CACHED, {"workers": TWO_NODES}),
}


def said(settings: OperatorSettings, spec: dict[str, Any]) -> str:
    """A line for each problem, and for each notice that a job at rest does not have."""
    job, plain = stored(**spec), cluster_notices(stored(), SETTINGS)
    notices = [notice for notice in cluster_notices(job, settings) if notice not in plain]
    lines = [f"refused: {problem}" for problem in job_problems(job, settings)] + [f"notice: {one}" for one in notices]
    return "".join(f"{line}\n" for line in lines) or "nothing\n"


def rendered() -> str:
    """The file."""
    situations = {**{name: (SETTINGS, spec) for name, spec in SPECS.items()}, **OTHER_SETTINGS}
    return "\n".join(f"== {name}\n{said(*situation)}" for name, situation in situations.items())


def test_every_sentence_is_the_one_that_was_read_by_a_person() -> None:
    assert rendered() == FILE.read_text()


if __name__ == "__main__":
    FILE.write_text(rendered())
