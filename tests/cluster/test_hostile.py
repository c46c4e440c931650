"""Nonsense from tenants, in jobs, last words and pod status: never an end of the operator, never a delay for others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tests.cluster.api import Api, Object, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.kubelet import Kubelet
from tests.cluster.scene import Scene, success

JOB_LABELS = {"finetune.dev/job-uid": "none"}
MOST_WRITES = 12
"""Of one job whose pod ended with nonsense: its objects, a few statuses and events; not one per second."""


def _words(**more: Any) -> str:
    return json.dumps({**json.loads(success()), **more})


LAST_WORDS: Mapping[str, str] = {
    "empty": " ",
    "no-json": "Segmentation fault (core dumped)",
    "huge": "x" * 200_000,
    "deep": "[" * 5_000,
    "list": "[1, 2, 3]",
    "nan": success().replace("0.5", "NaN"),
    "infinite": success().replace("0.5", "1e999"),
    "wrong-types": _words(succeeded="yes", rank="first", message={"a": 1}),
    "long-uri": _words(adapter={**json.loads(success())["adapter"], "uri": "s3://" + "a" * 5_000}),
    "control-characters": _words(succeeded=False, reason="DataInvalid", message="a\x00b\x1b[31m\u202e"),
    "no-adapter": _words(adapter=None),
    "huge-numbers": _words(adapter={**json.loads(success())["adapter"], "sizeBytes": 10**30}),
    "unknown-reason": _words(succeeded=False, reason="BecauseISaySo"),
    "unknown-version": _words(version=99),
}


def nonsense(status: Object) -> Mapping[str, Object]:
    """Pod statuses that the API server takes; `status` is one that makes sense."""
    container = status["containerStatuses"][0]
    ended = {"exitCode": -1, "reason": "\u0000", "finishedAt": "9999-12-31T23:59:59Z", "message": "\u0000" * 1000}
    return {
        "no-containers": {"phase": "Failed", "containerStatuses": []},
        "other-container": {"phase": "Running", "containerStatuses": [{**container, "name": "other"}]},
        "strange-phase": {"phase": "Dancing"},
        "far-future": {"phase": "Failed", "containerStatuses": [{**container, "state": {"terminated": ended}}]},
        "long-reason": {"phase": "Failed", "reason": "R" * 5000, "message": "m" * 50_000},
        "waits-for-ever": {
            "phase": "Pending",
            "containerStatuses": [{**container, "state": {"waiting": {"reason": "W" * 3000, "message": "w" * 50_000}}}],
        },
    }


def test_no_nonsense_of_tenants_ends_the_operator_or_keeps_it_busy(
    operator_factory: OperatorFactory, api: Api, kubelet: Kubelet
) -> None:
    def job(name: str) -> Scene:
        return Scene(api, kubelet, name)

    operator = operator_factory(retry_base_seconds=600, retry_limit_seconds=600)
    operator.start()
    pid = operator.server.pid
    _foreign_objects(api)
    for name in [f"says-{name}" for name in LAST_WORDS]:
        job(name).apply()
    for name, words in LAST_WORDS.items():
        scene = job(f"says-{name}")
        pod = kubelet.run(scene.pods()[0])
        if name in ("deep", "no-json", "control-characters", "unknown-reason"):
            kubelet.fail(pod, 1, words)
        else:
            kubelet.succeed(pod, words)
    for name in LAST_WORDS:
        status = job(f"says-{name}").wait_phase("Failed", "Retrying")
        assert status["attempts"][0]["message"]
    strange = []
    job("pod-template").apply()
    example = kubelet.run(job("pod-template").pods()[0])["status"]
    for name, status in nonsense(example).items():
        scene = job(f"pod-{name}")
        scene.apply()
        strange.append(scene)
        api.patch_status("Pod", scene.pods()[0]["metadata"]["name"], status)
    # Others are not kept waiting, and who wrote nonsense can still be stopped.
    job("honest").apply()
    job("honest").run()
    kubelet.succeed(job("honest").pod(), success())
    job("honest").wait_phase("Succeeded")
    for scene in strange:
        scene.change(suspend=True)
        scene.wait_phase("Suspended", "Failed")
    wait_until(lambda: operator.metrics().count("finetune_queue_depth 0.0"))
    assert operator.server.pid == pid
    assert operator.running
    assert "unforeseen" not in operator.log()
    writes = Counter(request.name for request in operator.writes() if request.resource == "finetunejobs/status")
    assert max(writes.values()) <= MOST_WRITES, writes


def _foreign_objects(api: Api) -> None:
    """Objects that wear our labels and are not ours, or wear them wrongly."""
    worker = {"replicas": 1, "template": {"spec": {"containers": [{"name": "pytorch", "image": "x"}]}}}
    spec = {"pytorchReplicaSpecs": {"Worker": worker}, "runPolicy": {"suspend": True}}
    labels = [
        JOB_LABELS,
        {**JOB_LABELS, "finetune.dev/job-name": ""},
        {**JOB_LABELS, "finetune.dev/job-name": "nobody", "finetune.dev/attempt": "many"},
    ]
    for number, wrong in enumerate(labels):
        metadata = {"name": f"foreign-{number}", "labels": wrong}
        api.create({"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata, "spec": spec})
