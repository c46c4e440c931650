"""What a cluster cannot do although a laptop could: the place and a sentence, before anything is created."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.desired import cluster_notices, job_problems
from tests.operator.desired.built import SETTINGS, stored

DATA = {"name": "data", "mountPath": "/data", "persistentVolumeClaim": {"claimName": "data"}}
CLAIM = {"uri": "pvc://results/out"}


def volume(**changes: Any) -> dict[str, Any]:
    """Workers with one volume."""
    return {"workers": {"volumes": [DATA | changes]}}


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        ({"train_path": "data/train.jsonl"}, "spec.train_path", "no volume of the job holds it"),
        ({"train_path": "/data/train.jsonl"}, "spec.train_path", "no volume of the job holds it"),
        ({"valid_path": "file:///x/v.jsonl"}, "spec.valid_path", "no volume of the job holds it"),
        ({"output": {"uri": "/out"}}, "spec.output.uri", "no volume of the job holds it"),
        (
            {"train_path": "/data/t.jsonl", "workers": {"volumes": [DATA | {"mountPath": "/database"}]}},
            "spec.train_path",
            "no volume of the job holds it",
        ),
        (
            {"output": {"uri": "/data/out"}, **volume(readOnly=True)},
            "spec.output.uri",
            "read-only",
        ),
        (volume(mountPath="/dev/shm/x"), "spec.workers.volumes[0].mountPath", "would hide or lie in"),  # noqa: S108
        (volume(mountPath="/etc/finetune"), "spec.workers.volumes[0].mountPath", "/etc/finetune"),
        (volume(mountPath="/mnt"), None, None),
        ({"output": {"uri": "hf://owner/name"}}, None, None),
        (volume(mountPath="/proc/x"), "spec.workers.volumes[0].mountPath", "belongs to the kernel"),
        (volume(name="finetune-job"), "spec.workers.volumes[0].name", "the operator's"),
        (volume(subPath="../x"), "spec.workers.volumes[0].subPath", "leaves the volume"),
        ({"workers": {"volumes": [DATA, DATA | {"name": "b"}]}}, "spec.workers.volumes[1].mountPath", "given twice"),
        ({"workers": {"env": [{"name": "PET_NNODES", "value": "3"}]}}, "spec.workers.env[0]", "workers.nodes"),
        ({"workers": {"env": [{"name": "HOME", "value": "/x"}]}}, "spec.workers.env[0]", "HOME cannot be set"),
        (
            {"workers": {"cache": {"persistentVolumeClaim": {"claimName": "c", "readOnly": True}}}},
            "spec.workers.cache.persistentVolumeClaim.readOnly",
            "remove readOnly",
        ),
        (
            {
                "output": CLAIM,
                **volume(persistentVolumeClaim={"claimName": "results", "readOnly": True}),
            },
            "spec.workers.volumes[0].persistentVolumeClaim.readOnly",
            "written to by this job",
        ),
        ({"train_path": "/data/train.jsonl", **volume()}, None, None),
        ({"train_path": "pvc://data/train.jsonl", "output": CLAIM}, None, None),
        ({"train_path": "hf://datasets/acme/x/train.jsonl"}, None, None),
    ],
)
def test_the_place_and_what_to_do(spec: dict[str, Any], path: str | None, words: str | None) -> None:
    problems = job_problems(stored(**spec), SETTINGS)
    if path is None or words is None:
        assert problems == []
        return
    (problem,) = problems
    assert problem.path == path
    assert words in problem.message


def test_without_output_and_default_the_job_is_refused() -> None:
    (problem,) = job_problems(stored(), SETTINGS.model_copy(update={"default_output_uri": None}))
    assert problem.path == "spec.output"
    assert "s3://bucket/prefix" in problem.message


def test_a_job_that_no_config_map_holds_is_refused() -> None:
    long = "x" * 16_000
    formats = {"system": long + "{instruction}", "user": "{instruction}", "assistant": "{instruction}</s>"}
    assert job_problems(stored(generation_config={"prompt_format": formats}), SETTINGS) == []
    values = [{"name": f"V{index}", "value": "y" * 4096} for index in range(128)]
    problems = job_problems(stored(workers={"env": values}), SETTINGS)
    assert [problem.path for problem in problems] == ["spec"]
    assert "1024 KiB" in problems[0].message


def test_an_accelerator_that_the_operator_does_not_know_is_no_secret() -> None:
    job = stored(worker_resources={"accelerator_type:H200": 0.001, "memory": 1})
    notices = {notice.path: notice.message for notice in cluster_notices(job, SETTINGS)}
    assert "no node selector for it" in notices["spec.worker_resources"]
    assert "no effect" in notices["spec.worker_resources.memory"]
    known = SETTINGS.model_copy(update={"accelerator_node_selectors": {"H200": {"gpu": "h200"}}})
    assert "spec.worker_resources" not in {notice.path for notice in cluster_notices(job, known)}


def test_a_claim_on_several_nodes_is_pointed_out() -> None:
    job = stored(output=CLAIM, workers={"nodes": 2})
    assert any("ReadWriteMany" in notice.message for notice in cluster_notices(job, SETTINGS))
