"""How large a job may be, and how much is said of one. What is said, test_sentences.py holds."""

from __future__ import annotations

from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.problem import MOST
from finetune_operator.desired import cluster_notices, job_problems
from tests.operator.desired.built import SETTINGS, stored

DATA = {"name": "data", "mountPath": "/data", "persistentVolumeClaim": {"claimName": "data"}}


def test_a_job_that_is_too_large_with_its_defaults_is_refused_before_a_pod_finds_out() -> None:
    def values(count: int) -> FineTuneJob:
        rows: list[Any] = [[1] * 100 for _ in range(98)]
        return stored(deepspeed={"rows": rows, "rest": [1] * count})

    assert job_problems(values(0), SETTINGS) == []
    (problem,) = job_problems(values(90), SETTINGS)
    assert problem.path == "spec"
    assert problem.message.startswith("spec, with its defaults written out, holds more than 10000 values")


def test_of_many_reasons_the_first_are_told() -> None:
    volumes = [DATA | {"name": f"v{number}", "mountPath": f"/proc/{number}"} for number in range(32)]
    problems = job_problems(stored(workers={"volumes": volumes}), SETTINGS)
    assert len(problems) == MOST + 1
    assert problems[-1].message == "and 22 more, which are named once these are gone."


def test_of_many_notices_the_first_are_told() -> None:
    job = stored(worker_resources={f"k{number}": 1 for number in range(200)})
    notices = cluster_notices(job, SETTINGS)
    assert len(notices) == MOST + 1
    assert notices[-1].message == "and 190 more, which are named once these are gone."
