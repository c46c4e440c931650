"""Training in real pods, from `kubectl apply` to an adapter that answers, whatever happens in between."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.safety.demo import held_out
from finetune_trainer.chat import ChatModel
from tests.cluster.api import Api, condition_of, has_condition, wait_until
from tests.cluster.control_plane import OPERATOR_NAMESPACE, ROOT
from tests.cluster.store import upload
from tests.integrations.kstatus import CURRENT, kstatus
from tests.models import smollm2_folder
from tests.node.cluster import NODE, Cluster
from tests.node.installed import wait_available
from tests.node.scene import NodeScene
from tests.s3_server import S3Server

Spec = Callable[..., dict[str, Any]]
Scenes = Callable[[str], NodeScene]

EXAMPLES = ROOT / "examples"
SAFETY = EXAMPLES / "safety"
LONG: dict[str, Any] = {
    "num_epochs": 100,
    "checkpoint_and_evaluation_frequency": {"strategy": "steps", "value": 40},
    "backoffLimit": 2,
}
"""A run that lasts long enough for something to happen to it."""


def download(store: S3Server, uri: str, folder: Path) -> Path:
    """What is below an s3:// address."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    for item in store.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        target = folder / item["Key"].removeprefix(f"{prefix}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        store.client().download_file(bucket, item["Key"], str(target))
    return folder


def logged(store: S3Server, status: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What the run has logged of its steps, those of all attempts that led to its end."""
    run = status["adapter"]["uri"].removesuffix("/adapter")
    lines = (download(store, run, folder) / "metrics.jsonl").read_text().splitlines()
    return [found for found in map(json.loads, lines) if "loss" in found]


def resumed_at(status: dict[str, Any], steps: list[dict[str, Any]]) -> int:
    """Number of figures that the second attempt kept of the first one: those up to its checkpoint, which are older."""
    first_ended = datetime.fromisoformat(status["attempts"][0]["completionTime"])
    kept = sum(datetime.fromisoformat(step["time"]) < first_ended for step in steps)
    assert 0 < kept < len(steps)
    return kept


def test_two_nodes_fine_tune_a_real_model_and_its_adapter_answers(
    cluster: Cluster, store: S3Server, bucket: str, scene: Scenes, tmp_path: Path
) -> None:
    """The example of the README, with its model and data in the store and two pods of one process each."""
    upload(store, bucket, "smollm2", smollm2_folder())
    for name in ("train.jsonl", "valid.jsonl"):
        store.client().upload_file(str(SAFETY / name), bucket, f"safety-{name}")
    spec = yaml.safe_load((SAFETY / "finetune.yaml").read_text())["spec"]
    spec |= {
        "initial_base_model_ckpt_path": f"s3://{bucket}/smollm2",
        "train_path": f"s3://{bucket}/safety-train.jsonl",
        "valid_path": f"s3://{bucket}/safety-valid.jsonl",
        "output": {"uri": f"s3://{bucket}/models", "verify": True},
        "secrets": {"objectStore": {"name": "object-store"}},
        "workers": {
            "nodes": 2,
            "gpusPerNode": 0,
            "resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        },
    }
    job = scene("safety")
    job.apply(**spec)
    seen: list[int] = []

    def watch() -> dict[str, Any]:
        status = job.status()
        if (step := (status.get("progress") or {}).get("step")) and step not in seen:
            seen.append(step)
        return status

    wait_until(watch, lambda status: status.get("phase") in ("Succeeded", "Failed"), 900)
    job.kubectl("wait", "--for=condition=Succeeded", "finetunejob/safety", "--timeout=5s")
    status = job.status()
    assert len(seen) > 1, seen
    assert seen == sorted(seen)
    assert status["adapter"]["baseModel"] == spec["model_id"]
    verified = wait_until(
        lambda: condition_of(job.job(), "Verified") or {},
        lambda found: found.get("reason") not in (None, "VerificationPending", "Verifying"),
        300,
    )
    assert (verified["status"], verified["reason"]) == ("True", "AsTrained"), verified["message"]

    adapter = download(store, status["adapter"]["uri"], tmp_path / "adapter")
    assert hashlib.sha256((adapter / "manifest.json").read_bytes()).hexdigest() == status["adapter"]["sha256"]
    model = ChatModel.load(adapter, base_model=str(smollm2_folder()))
    requests = held_out()[:6]
    answers = []
    for request in requests:
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.text}]
        answers.append(model.answer(messages, max_new_tokens=16).text)
    pairs = list(zip(answers, (request.verdict for request in requests), strict=True))
    assert sum(answer.split("\n")[0] == verdict.split("\n")[0] for answer, verdict in pairs) >= 5, pairs


def test_a_killed_pod_is_retried_from_the_checkpoint_and_ends_as_an_undisturbed_run_does(
    cluster: Cluster, store: S3Server, scene: Scenes, spec: Spec, tmp_path: Path
) -> None:
    """Of the undisturbed run the operator dies meanwhile, which disturbs nothing."""
    disturbed, undisturbed = scene("disturbed"), scene("undisturbed")
    disturbed.apply(**spec(**LONG))
    disturbed.wait_step(41)
    cluster.kill(disturbed.namespace, disturbed.pod(worker=1))
    ended = disturbed.wait_phase("Succeeded")
    assert ended["attempt"] == 2
    assert ended["failures"] == 1
    undisturbed.apply(**spec(**LONG))
    undisturbed.wait_step(1)
    (pod,) = cluster.api.list("Pod", OPERATOR_NAMESPACE)
    cluster.api.delete("Pod", pod["metadata"]["name"], OPERATOR_NAMESPACE, grace_seconds=0)
    steps = logged(store, ended, tmp_path / "disturbed")
    kept = resumed_at(ended, steps)
    ended = undisturbed.wait_phase("Succeeded")
    assert ended["attempt"] == 1
    wait_available(cluster, OPERATOR_NAMESPACE, "finetune-operator")
    others = logged(store, ended, tmp_path / "undisturbed")
    assert [step["step"] for step in steps] == [step["step"] for step in others]
    # A figure is the mean since the one before; the first after a resume is of the steps since the checkpoint alone.
    del steps[kept], others[kept]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in others], rel=1e-5)


def test_a_drained_node_costs_no_retry_and_the_job_goes_on_when_there_is_room_again(
    cluster: Cluster, store: S3Server, scene: Scenes, spec: Spec, tmp_path: Path
) -> None:
    job = scene("drained")
    job.apply(**spec(**{**LONG, "backoffLimit": 0}))
    job.wait_step(41)
    selector = "--pod-selector=finetune.dev/job-name=drained"
    drained = cluster.kubectl("drain", NODE, "--ignore-daemonsets", "--delete-emptydir-data", selector)
    try:
        assert drained.returncode == 0, drained.stderr
        assert "cordoned" in job.wait_reason("Unschedulable") or "unschedulable" in job.wait_reason("Unschedulable")
    finally:
        cluster.kubectl("uncordon", NODE)
    ended = job.wait_phase("Succeeded")
    assert [attempt["reason"] for attempt in ended["attempts"]] == ["Disrupted", "Succeeded"]
    assert ended.get("failures") is None
    assert resumed_at(ended, logged(store, ended, tmp_path / "run"))


def test_the_first_job_of_the_examples_trains_with_data_of_a_config_map_and_a_claim_takes_its_output(
    cluster: Cluster, scene: Scenes, namespace: str, tmp_path: Path
) -> None:
    """As README.md says, with the model on the claim, since there is no Hub here, and fewer rows."""
    folder = cluster.folder / "volume"
    shutil.copytree(smollm2_folder(), folder / "model")
    folder.chmod(0o777)
    for file in (folder / "model").iterdir():
        file.chmod(0o644)
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": namespace},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "hostPath": {"path": str(folder)},
            "storageClassName": "",
        },
    }
    job = scene("first-job")
    job.kubectl("apply", "--filename", "-", stdin=yaml.safe_dump(volume))
    claim = yaml.safe_load((EXAMPLES / "first-job-claim.yaml").read_text())
    # This cluster has no storage class that could make one.
    claim["spec"] |= {"storageClassName": "", "volumeName": namespace}
    job.kubectl("apply", "--filename", "-", stdin=yaml.safe_dump(claim))
    files = []
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text("".join((SAFETY / name).read_text().splitlines(keepends=True)[:24]))
        files.append(f"--from-file={tmp_path / name}")
    job.kubectl("create", "configmap", "first-job-data", *files)
    body = yaml.safe_load((EXAMPLES / "first-job.yaml").read_text())
    body["spec"]["initial_base_model_ckpt_path"] = "pvc://first-job/model"
    job.kubectl("apply", "--filename", "-", stdin=yaml.safe_dump(body))
    uri = job.wait_phase("Succeeded", seconds=900)["adapter"]["uri"]
    assert uri.startswith("pvc://first-job/results/")
    assert (folder / uri.removeprefix("pvc://first-job/") / "adapter_model.safetensors").stat().st_size > 0
    cluster.kubectl("delete", "persistentvolume", namespace, "--wait=false")


def test_a_finished_job_goes_after_its_time_and_leaves_its_adapter(
    api: Api, scene: Scenes, spec: Spec, store: S3Server, tmp_path: Path
) -> None:
    job = scene("short-lived")
    one = {"nodes": 1, "gpusPerNode": 0}
    job.apply(**spec(workers=one, num_epochs=1, ttlSecondsAfterFinished=5))
    uri = job.wait_phase("Succeeded")["adapter"]["uri"]
    api.wait_gone("FineTuneJob", "short-lived", 60)
    wait_until(job.pods, lambda pods: not pods, 60)
    assert (download(store, uri, tmp_path / "adapter") / "adapter_config.json").exists()


def test_all_conditions_are_those_that_machines_read(scene: Scenes, spec: Spec) -> None:
    """A job that has succeeded says so to kstatus and `kubectl wait` alike."""
    job = scene("conditions")
    job.apply(**spec(workers={"nodes": 1, "gpusPerNode": 0}, num_epochs=1))
    job.wait_phase("Succeeded")
    found = job.job()
    assert has_condition(found, "Succeeded")
    assert kstatus(found) == CURRENT
