"""Whole objects, as they go to the API server: what `kubectl get -o yaml` shows of jobs of several kinds.

After a change, `python -m tests.operator.desired.test_manifests` writes the files anew; read what became of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.workers import Resources
from finetune_operator.desired import job_config_map, pytorch_job, verification_job
from finetune_operator.settings import OperatorSettings
from tests.operator.desired.built import SETTINGS, stored

FOLDER = Path(__file__).parent / "manifests"
ADDRESS = "s3://models/team-a/guard/adapter"

BARE = OperatorSettings(trainer_image="trainer:1", pod_user_id=None)
PLATFORM = SETTINGS.model_copy(
    update={
        "trainer_image": "registry.example/trainer:1",
        "object_store_secret": "store-of-all",
        "hugging_face_secret": "hub-of-all",
        "queue_name": "everybody",
        "cache_claim": "models",
        "default_resources": Resources(requests={"cpu": "4", "memory": "32Gi"}),
        "shared_memory_size": "8Gi",
        "scratch_size": "20Gi",
        "termination_grace_seconds": 60,
        "accelerator_node_selectors": {"A100": {"gpu": "a100"}},
    }
)
RICH: dict[str, Any] = {
    "output": {"uri": "pvc://results/team"},
    "model_revision": "Über",
    "train_path": "pvc://data/train.jsonl",
    "secrets": {"huggingFace": {"name": "hub", "key": "mine"}, "objectStore": {"name": "store"}},
    "worker_resources": {"accelerator_type:A100": 1},
    "workers": {
        "nodes": 2,
        "gpusPerNode": 4,
        "gpuResourceName": "amd.com/gpu",
        "image": "registry.example/own:2",
        "imagePullPolicy": "Always",
        "imagePullSecrets": [{"name": "pull"}],
        "resources": {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi"}},
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "serviceAccountName": "trainer",
        "cache": {"sizeLimit": "100Gi"},
        "env": [
            {"name": "NCCL_DEBUG", "value": "INFO"},
            {"name": "OTHER", "valueFrom": {"secretKeyRef": {"name": "own", "key": "key"}}},
        ],
        "volumes": [
            {"name": "config", "mountPath": "/config", "configMap": {"name": "settings"}},
            {"name": "keys", "mountPath": "/keys", "secret": {"secretName": "keys"}, "subPath": "one"},
            {"name": "room", "mountPath": "/room", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
            {"name": "more", "mountPath": "/more", "persistentVolumeClaim": {"claimName": "data"}, "readOnly": True},
        ],
    },
}
LABELS = {"kueue.x-k8s.io/queue-name": "team", "kueue.x-k8s.io/priority-class": "low", "mine": "x"}
CPU: dict[str, Any] = {"workers": {"gpusPerNode": 0}, "output": {"uri": "s3://models/x"}}

MADE: Mapping[str, Callable[[], dict[str, Any]]] = {
    "bare": lambda: pytorch_job(stored(**CPU), 1, BARE),
    "rich": lambda: pytorch_job(stored(LABELS, **RICH), 3, PLATFORM, ("node-7", "node-3")),
    "platform": lambda: pytorch_job(stored(), 1, PLATFORM),
    "config-map": lambda: job_config_map(stored(LABELS, **RICH), 3, PLATFORM),
    "verification-bare": lambda: verification_job(stored(**CPU), 1, ADDRESS, BARE),
    "verification-rich": lambda: verification_job(stored(LABELS, **RICH), 3, ADDRESS, PLATFORM, ("node-7",)),
}


@pytest.mark.parametrize("name", MADE)
def test_an_object_is_the_one_that_was_read_by_a_person(name: str) -> None:
    assert MADE[name]() == yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def test_no_file_is_left_of_an_object_that_is_made_no_more() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MADE)


class Readable(yaml.SafeDumper):
    """Writes a text of several lines as such."""


Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)

if __name__ == "__main__":
    for name, make in MADE.items():
        text = yaml.dump(make(), Dumper=Readable, sort_keys=False, width=120, allow_unicode=True)
        (FOLDER / f"{name}.yaml").write_text(text)
