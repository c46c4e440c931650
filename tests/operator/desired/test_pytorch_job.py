"""The PyTorchJob of an attempt: its shape, its pods' security, and what reaches the trainer."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.names import child_name, pod_name
from finetune_trainer.launch import environment as launcher
from finetune_trainer.storage.addresses import DEFAULT_PVC_ROOT
from finetune_trainer.train.progress import CA_CERT_ENV, SERVER_URL_ENV, TOKEN_PATH_ENV
from tests.operator.desired.built import SETTINGS, UID, container, environment, pod, pytorch, stored

DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")

names = st.from_regex(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)
uids = st.uuids().map(str)


@given(names, uids, st.integers(1, 9999), st.integers(0, 1023))
def test_names_are_labels_and_leave_room_for_the_pods(name: str, uid: str, attempt: int, index: int) -> None:
    child = child_name(name, uid, attempt)
    assert DNS_1035.match(child)
    assert len(pod_name(child, index)) <= 63
    assert child != child_name(name, uid, attempt + 1)


@pytest.mark.parametrize(
    ("workers", "replicas", "per_node", "world"),
    [
        ({}, 1, "1", "1"),
        ({"nodes": 2, "gpusPerNode": 8}, 2, "8", "16"),
        ({"nodes": 3, "gpusPerNode": 0}, 3, "1", "3"),
    ],
)
def test_one_worker_per_node_and_nothing_of_the_training_operators_life_cycle(
    workers: dict[str, Any], replicas: int, per_node: str, world: str
) -> None:
    job = stored(workers=workers)
    spec = pytorch(job)["spec"]
    assert spec["nprocPerNode"] == per_node
    assert spec["runPolicy"] == {"cleanPodPolicy": "None"}
    assert set(spec) == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert (worker["replicas"], worker["restartPolicy"]) == (replicas, "Never")
    variables = environment(job)
    assert variables["FINETUNE_EXPECTED_WORLD_SIZE"] == world
    assert variables["FINETUNE_NPROC_PER_NODE"] == per_node


def test_llmforges_num_devices_becomes_nodes_and_gpus() -> None:
    job = stored(num_devices=16)
    assert pytorch(job)["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2
    assert container(job)["resources"]["limits"] == {"nvidia.com/gpu": "8"}


@pytest.mark.parametrize(
    ("workers", "resources"),
    [
        ({"gpusPerNode": 0}, None),
        ({"gpusPerNode": 4}, {"limits": {"nvidia.com/gpu": "4"}, "requests": {"nvidia.com/gpu": "4"}}),
        (
            {"gpusPerNode": 1, "gpuResourceName": "amd.com/gpu", "resources": {"requests": {"cpu": 4}}},
            {"limits": {"amd.com/gpu": "1"}, "requests": {"cpu": 4, "amd.com/gpu": "1"}},
        ),
    ],
)
def test_gpus_are_asked_for_by_their_name(workers: dict[str, Any], resources: dict[str, Any] | None) -> None:
    job = stored(workers=workers)
    assert container(job).get("resources") == resources
    # A job for the CPU takes no GPU even where the runtime shows all of them.
    assert (environment(job).get("CUDA_VISIBLE_DEVICES") == "") == (resources is None)


def test_pods_are_restricted_whatever_the_job_asks_for() -> None:
    spec, box = pod(stored()), container(stored())
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert box["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    assert not any("hostPath" in volume for volume in spec["volumes"])


def test_the_cluster_may_choose_the_user() -> None:
    security = pod(stored(), SETTINGS.model_copy(update={"pod_user_id": None}))["securityContext"]
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(security)


def test_variables_are_the_ones_that_the_trainer_reads() -> None:
    """Operator and trainer do not import each other, so only this notices when one of them renames a variable."""
    variables = environment(stored(workers={"nodes": 2, "gpusPerNode": 1}))
    assert {
        launcher.TERMINATION_MESSAGE_PATH,
        launcher.NPROC_PER_NODE,
        launcher.EXPECTED_WORLD_SIZE,
        launcher.GRACE_SECONDS,
        SERVER_URL_ENV,
        TOKEN_PATH_ENV,
        CA_CERT_ENV,
        "FINETUNE_CACHE_DIR",
    } <= set(variables)
    assert variables["FINETUNE_PVC_ROOT"] == DEFAULT_PVC_ROOT
    child = child_name("guard", UID, 1)
    assert variables["PET_MASTER_ADDR"] == f"{child}-worker-0"
    assert variables["PET_NODE_RANK"] == {
        "fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/replica-index']"}
    }
    box = container(stored())
    assert variables[launcher.TERMINATION_MESSAGE_PATH] == box["terminationMessagePath"]
    assert int(variables[launcher.GRACE_SECONDS]) < pod(stored())["terminationGracePeriodSeconds"]


def test_without_an_endpoint_no_token_is_projected() -> None:
    silent = SETTINGS.model_copy(update={"progress_url": None})
    assert not any(name.startswith("KUBEFLOW_") for name in environment(stored(), silent))
    assert not any("projected" in volume for volume in pod(stored(), silent)["volumes"])


def test_the_progress_token_is_ours_alone_and_the_certificate_may_be_missing() -> None:
    (projected,) = [volume["projected"] for volume in pod(stored())["volumes"] if "projected" in volume]
    token, authority = projected["sources"]
    assert token["serviceAccountToken"] == {"audience": "finetune-operator", "expirationSeconds": 3600, "path": "token"}
    assert authority["configMap"]["optional"] is True


def test_tokens_come_by_reference_only() -> None:
    job = stored(secrets={"huggingFace": {"name": "hf"}, "objectStore": {"name": "store"}})
    variables = environment(job)
    assert variables["HF_TOKEN"] == {"secretKeyRef": {"name": "hf", "key": "token"}}
    assert variables["AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "store", "key": "AWS_ACCESS_KEY_ID"}}
    assert variables["AWS_ENDPOINT_URL_S3"]["secretKeyRef"]["optional"] is True
    assert "envFrom" not in container(job)


def test_what_kubernetes_has_a_name_for_is_handed_through() -> None:
    workers = {
        "image": "registry.example/trainer:2",
        "imagePullPolicy": "Always",
        "imagePullSecrets": [{"name": "pull"}],
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "batch",
        "runtimeClassName": "nvidia",
        "serviceAccountName": "trainer",
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
    }
    job = stored(workers=workers)
    spec, box = pod(job), container(job)
    assert (box["image"], box["imagePullPolicy"]) == ("registry.example/trainer:2", "Always")
    for key in ("imagePullSecrets", "nodeSelector", "tolerations", "affinity", "priorityClassName", "runtimeClassName"):
        assert spec[key] == workers[key]
    assert spec["serviceAccountName"] == "trainer"
    assert environment(job)["NCCL_DEBUG"] == "INFO"


def test_queue_labels_go_to_the_pytorchjob_and_not_to_its_pods() -> None:
    labels = {"kueue.x-k8s.io/queue-name": "team", "kueue.x-k8s.io/priority-class": "low", "other": "x"}
    made = pytorch(stored(labels))
    assert {key: made["metadata"]["labels"].get(key) for key in labels} == {**labels, "other": None}
    template = made["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert not any("kueue" in key for key in template["metadata"]["labels"])
    assert "suspend" not in made["spec"]["runPolicy"]


def test_accelerators_become_the_platform_teams_node_selector() -> None:
    settings = SETTINGS.model_copy(update={"accelerator_node_selectors": {"A10G": {"gpu": "a10g", "pool": "x"}}})
    job = stored(worker_resources={"accelerator_type:A10G": 0.001}, workers={"nodeSelector": {"pool": "mine"}})
    assert pod(job, settings)["nodeSelector"] == {"gpu": "a10g", "pool": "mine"}


def test_claims_are_mounted_once_and_written_only_where_the_output_is() -> None:
    job = stored(
        model_id="pvc://models/llama",
        generation_config={"prompt_format": {"use_hugging_face_chat_template": True}},
        train_path="pvc://data/train.jsonl",
        valid_path="pvc://data/valid.jsonl",
        output={"uri": "pvc://models/out"},
        workers={"cache": {"persistentVolumeClaim": {"claimName": "cache"}}},
    )
    spec, box = pod(job), container(job)
    claims = {
        volume["persistentVolumeClaim"]["claimName"]: volume["persistentVolumeClaim"].get("readOnly", False)
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {"models": False, "data": True, "cache": False}
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in box["volumeMounts"]}
    assert mounts["/mnt/pvc/models"] is False
    assert mounts["/mnt/pvc/data"] is True
    assert len(mounts) == len(box["volumeMounts"])


def test_every_object_goes_with_its_job() -> None:
    owner = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": "guard", "uid": UID}
    (found,) = pytorch(stored())["metadata"]["ownerReferences"]
    assert found == {**owner, "controller": True}


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("uid", "FineTuneJob guard has no uid, so nothing can belong to it."),
        ("namespace", "FineTuneJob guard has no namespace."),
    ],
)
def test_nothing_is_made_of_a_job_that_no_server_stored(missing: str, sentence: str) -> None:
    job = stored()
    metadata = job.metadata.model_copy(update={missing: None})
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        pytorch(job.model_copy(update={"metadata": metadata}))


def test_the_object_is_plain_json() -> None:
    made = pytorch(stored(workers={"resources": {"limits": {"memory": "64Gi", "cpu": 8}}}))
    assert json.loads(json.dumps(made)) == made
