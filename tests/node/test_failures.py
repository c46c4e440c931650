"""What goes wrong in real pods: status says in a sentence what happened and what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.cluster.api import Api, wait_until
from tests.cluster.store import store_secret
from tests.node.scene import NodeScene
from tests.s3_server import S3Server, free_port

Spec = Callable[..., dict[str, Any]]
Scenes = Callable[[str], NodeScene]

ONE: dict[str, Any] = {"nodes": 1, "gpusPerNode": 0}


def test_too_little_memory_is_out_of_memory_with_advice(scene: Scenes, spec: Spec) -> None:
    job = scene("small")
    # Less than Python's own heap with the libraries: near it, the kernel reads libraries again and again instead.
    job.apply(**spec(workers={**ONE, "resources": {"limits": {"memory": "64Mi"}}}))
    status = job.wait_phase("Failed")
    message = job.wait_reason("OutOfMemory")
    assert "workers.resources.limits.memory" in message
    assert status["attempt"] == 1


def test_a_wrong_image_is_told_and_mended_by_suspending_and_editing(scene: Scenes, spec: Spec) -> None:
    job = scene("misspelled")
    job.apply(**spec(workers={**ONE, "image": "localhost/finetune-trainor:0.1.0"}))
    assert "localhost/finetune-trainor:0.1.0" in job.wait_reason("ImagePullFailed")
    job.change(suspend=True)
    job.wait_phase("Suspended")
    job.change(suspend=False, workers={**ONE, "image": None})
    assert job.wait_phase("Succeeded")["adapter"]["uri"]


def test_a_missing_secret_is_named_and_the_job_starts_once_it_is_there(
    api: Api, scene: Scenes, spec: Spec, store: S3Server
) -> None:
    job = scene("secretless")
    job.apply(**spec(workers=ONE, num_epochs=1, secrets={"objectStore": {"name": "later"}}))
    assert "later" in job.wait_reason("ConfigurationMissing")
    api.create(store_secret(store, "later"))
    job.wait_phase("Succeeded")


def test_a_store_that_does_not_answer_is_retried_and_then_named(
    api: Api, scene: Scenes, spec: Spec, store: S3Server
) -> None:
    endpoint = store.endpoint.rpartition(":")[0] + f":{free_port()}"
    secret = store_secret(store, "nowhere")
    secret["stringData"]["AWS_ENDPOINT_URL_S3"] = endpoint
    api.create(secret)
    job = scene("nowhere")
    job.apply(**spec(workers=ONE, backoffLimit=1, secrets={"objectStore": {"name": "nowhere"}}))
    status = job.wait_phase("Failed", seconds=600)
    assert [attempt["reason"] for attempt in status["attempts"]] == ["StorageUnavailable"] * 2
    assert endpoint in job.wait_reason("RetriesExhausted")


def test_a_deadline_ends_a_job_in_the_midst_of_training(scene: Scenes, spec: Spec) -> None:
    job = scene("late")
    job.apply(**spec(workers=ONE, num_epochs=5000))
    job.wait_step(1)
    job.change(activeDeadlineSeconds=1)
    job.wait_phase("Failed")
    job.wait_reason("DeadlineExceeded")
    wait_until(job.pods, lambda pods: not pods, 60)


def test_pods_of_a_deleted_job_end_within_seconds(scene: Scenes, spec: Spec) -> None:
    """Far sooner than the two minutes that they have."""
    job = scene("deleted")
    job.apply(**spec(workers={"nodes": 2, "gpusPerNode": 0}, num_epochs=5000))
    job.wait_step(1)
    names = {pod["metadata"]["name"] for pod in job.pods()}
    started = time.monotonic()
    job.kubectl("delete", "finetunejob", "deleted")
    wait_until(lambda: {pod["metadata"]["name"] for pod in job.pods()} & names, lambda left: not left, 60)
    print(f"Pods were gone after {time.monotonic() - started:.0f} s.")
