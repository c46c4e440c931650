"""The Job that verifies an adapter: as restricted as the workers, with nothing to write to and one GPU at most."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from finetune_api.job import FineTuneJob
from finetune_api.output import output_address
from finetune_operator.desired import verification_job
from finetune_operator.names import KUEUE_PRIORITY_LABEL, KUEUE_QUEUE_LABEL, child_name, verification_name
from finetune_operator.settings import OperatorSettings
from finetune_trainer.launch import environment as launcher
from finetune_trainer.storage.addresses import DEFAULT_PVC_ROOT
from tests.operator.desired.built import SETTINGS, UID, stored
from tests.operator.desired.built import container as worker
from tests.operator.desired.built import environment as variables_of_worker
from tests.operator.desired.built import pod as worker_pod
from tests.operator.desired.test_pytorch_job import DNS_1035, names, uids

ADDRESS = "s3://models/team-a/guard/adapter"
WORKERS: dict[str, Any] = {
    "nodes": 2,
    "gpusPerNode": 8,
    "image": "registry.example/trainer:1",
    "imagePullPolicy": "Always",
    "imagePullSecrets": [{"name": "pull"}],
    "resources": {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi"}},
    "nodeSelector": {"zone": "a"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "serviceAccountName": "trainer",
    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
}
SECRETS = {"huggingFace": {"name": "hub"}, "objectStore": {"name": "store"}}


def made(job: FineTuneJob, settings: OperatorSettings = SETTINGS, attempt: int = 1) -> dict[str, Any]:
    """The Job."""
    return verification_job(job, attempt, ADDRESS, settings)


def pod(job: FineTuneJob, settings: OperatorSettings = SETTINGS, attempt: int = 1) -> dict[str, Any]:
    """The spec of its pod."""
    spec: dict[str, Any] = made(job, settings, attempt)["spec"]["template"]["spec"]
    return spec


def container(job: FineTuneJob, settings: OperatorSettings = SETTINGS) -> dict[str, Any]:
    """Its container."""
    (found,) = pod(job, settings)["containers"]
    return dict(found)


def variables(job: FineTuneJob, settings: OperatorSettings = SETTINGS) -> dict[str, Any]:
    """Variable -> its value, or where it comes from."""
    found = container(job, settings)["env"]
    by_name = {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in found}
    assert len(by_name) == len(found)
    return by_name


@given(names, uids)
def test_its_name_is_a_label_and_leaves_room_for_the_pods(name: str, uid: str) -> None:
    child = verification_name(name, uid)
    assert DNS_1035.match(child)
    # Kubernetes adds a dash and five characters, and cuts what is longer.
    assert len(child) + 6 <= 63
    assert child != child_name(name, uid, 1)


def test_it_belongs_to_the_job_and_to_no_attempt() -> None:
    metadata = made(stored())["metadata"]
    (owner,) = metadata["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("FineTuneJob", UID, True)
    labels = made(stored())["spec"]["template"]["metadata"]["labels"]
    for found in (metadata["labels"], labels):
        assert (found["finetune.dev/job-name"], found["finetune.dev/job-uid"]) == ("guard", UID)
        # Or it would be taken for a worker.
        assert "finetune.dev/attempt" not in found
    # What a NetworkPolicy selects trainers by.
    assert labels["app.kubernetes.io/name"] == "finetune-trainer"


def test_only_what_nobody_is_to_blame_for_is_tried_again() -> None:
    spec = made(stored(), SETTINGS.model_copy(update={"verification_seconds": 60}))["spec"]
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (2, 60)
    # Kueue's, where it manages Jobs; and what has ended stays for its log.
    assert not {"suspend", "ttlSecondsAfterFinished"} & set(spec)
    first, second = spec["podFailurePolicy"]["rules"]
    assert (first["action"], first["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (second["action"], second["onExitCodes"]["values"]) == ("FailJob", [1, 2, 137])
    assert second["onExitCodes"]["containerName"] == container(stored())["name"]


def test_it_runs_where_the_workers_ran_with_what_they_had() -> None:
    job = stored(workers=WORKERS, secrets=SECRETS)
    shared = set(worker_pod(job)) - {"containers", "volumes"}
    assert {key: pod(job)[key] for key in shared} == {key: worker_pod(job)[key] for key in shared}
    assert set(pod(job)) == set(worker_pod(job))
    own = {"name", "command", "env", "resources", "volumeMounts", "ports"}
    same = set(worker(job)) - own
    assert {key: container(job)[key] for key in same} == {key: worker(job)[key] for key in same}


@pytest.mark.parametrize(("gpus", "asked"), [(8, "1"), (1, "1"), (0, None)])
def test_one_gpu_is_enough(gpus: int, asked: str | None) -> None:
    job = stored(workers={**WORKERS, "gpusPerNode": gpus})
    resources = container(job)["resources"]
    assert resources["limits"].get("nvidia.com/gpu") == resources["requests"].get("nvidia.com/gpu") == asked
    assert resources["requests"]["memory"] == "64Gi"
    assert (variables(job).get("CUDA_VISIBLE_DEVICES") == "") == (asked is None)


def test_its_variables_are_the_workers_without_a_group_and_without_progress() -> None:
    job = stored(workers=WORKERS, secrets=SECRETS)
    found, workers = variables(job), variables_of_worker(job)
    assert found.items() <= workers.items()
    gone = {launcher.NPROC_PER_NODE, launcher.EXPECTED_WORLD_SIZE, launcher.GRACE_SECONDS}
    assert {name for name in set(workers) - set(found) if not name.startswith(("PET_", "KUBEFLOW_"))} == gone
    assert found[launcher.TERMINATION_MESSAGE_PATH] == container(job)["terminationMessagePath"]
    assert found["FINETUNE_PVC_ROOT"] == DEFAULT_PVC_ROOT
    assert found["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "store", "key": "AWS_SECRET_ACCESS_KEY"}}


def test_it_has_no_token_of_any_kind() -> None:
    spec = pod(stored())
    assert spec["automountServiceAccountToken"] is False
    assert not any("projected" in volume for volume in spec["volumes"])


def test_it_reads_the_job_of_the_attempt_and_the_adapter_at_its_address() -> None:
    job = stored()
    assert container(job)["command"] == [
        *("python", "-m", "finetune_trainer.verify"),
        *("--job", "/etc/finetune/job.yaml"),
        *("--adapter", ADDRESS),
    ]
    (volume,) = (volume for volume in pod(job, attempt=3)["volumes"] if "configMap" in volume)
    assert volume["configMap"]["name"] == child_name("guard", UID, 3)


@pytest.mark.parametrize(
    ("address", "argument"),
    [
        ("s3://models/$(AWS_SECRET_ACCESS_KEY)/a b", "s3://models/$$(AWS_SECRET_ACCESS_KEY)/a b"),
        ("s3://models/$$(AWS_SECRET_ACCESS_KEY)", "s3://models/$$$$(AWS_SECRET_ACCESS_KEY)"),
        ("s3://models/$", "s3://models/$$"),
    ],
)
def test_an_address_is_taken_to_the_letter(address: str, argument: str) -> None:
    body = verification_job(stored(), 1, address, SETTINGS)
    (found,) = body["spec"]["template"]["spec"]["containers"]
    assert found["command"][-1] == argument


def test_claims_of_addresses_are_mounted_to_read_and_the_cache_to_write() -> None:
    job = stored(
        train_path="pvc://data/train.jsonl",
        output={"uri": "pvc://results/team"},
        workers={"cache": {"persistentVolumeClaim": {"claimName": "models"}}},
    )
    assert (output_address(job) or "").startswith("pvc://results/team/")
    sources = [volume["persistentVolumeClaim"] for volume in pod(job)["volumes"] if "persistentVolumeClaim" in volume]
    assert {source["claimName"]: source.get("readOnly", False) for source in sources} == {
        "data": True,
        "results": True,
        "models": False,
    }
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container(job)["volumeMounts"]}
    assert (mounts["/mnt/pvc/data"], mounts["/mnt/pvc/results"], mounts["/var/cache/finetune"]) == (True, True, False)


def test_queue_labels_go_to_the_job_and_not_to_its_pod() -> None:
    body = made(stored(labels={KUEUE_QUEUE_LABEL: "team", KUEUE_PRIORITY_LABEL: "high", "mine": "x"}))
    labels = body["metadata"]["labels"]
    assert (labels[KUEUE_QUEUE_LABEL], labels[KUEUE_PRIORITY_LABEL]) == ("team", "high")
    assert "mine" not in labels
    assert KUEUE_QUEUE_LABEL not in body["spec"]["template"]["metadata"]["labels"]
    quiet = SETTINGS.model_copy(update={"queue_name": "everybody"})
    assert made(stored(), quiet)["metadata"]["labels"][KUEUE_QUEUE_LABEL] == "everybody"


def test_the_object_is_plain_json() -> None:
    body = made(stored(workers=WORKERS, secrets=SECRETS))
    assert json.loads(json.dumps(body)) == body
