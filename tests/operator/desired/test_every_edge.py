"""Whatever a job says that the schema allows, what is made of it is made without an error, and reads back as it was."""

from __future__ import annotations

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.load import load_job, load_manifest
from finetune_api.problem import MOST
from finetune_operator.desired import (
    cluster_notices,
    effective_job,
    job_config_map,
    job_problems,
    pytorch_job,
    same_placement,
    same_training,
    verification_job,
)
from finetune_operator.desired.continuation import continued
from finetune_operator.desired.fingerprint import is_edited
from tests.api.jobs import manifest
from tests.cluster.api import Object
from tests.cluster.hostile import Edge, accepted, allowed_edges, completed, packed, sorted_out
from tests.operator.desired.built import SETTINGS, UID

READ_BYTES = 100_000
"""Of a spec: below what is refused for its size."""


def _read(spec: Object) -> FineTuneJob | None:
    """The job, if it is accepted in a cluster. Nothing may be raised, whatever the spec is."""
    result = load_manifest({**manifest(), "metadata": {"name": "a", "namespace": "b", "uid": UID}, "spec": spec})
    assert max(len(result.errors), len(result.warnings)) <= MOST + 1
    if result.job is None:
        assert result.errors
        return None
    assert len(cluster_notices(result.job, SETTINGS)) <= MOST + 1
    return result.job if job_problems(result.job, SETTINGS) == [] else None


@pytest.fixture(scope="module")
def edges() -> tuple[list[Edge], list[Edge]]:
    """Every edge of every field: those that are accepted, and those that are refused with a sentence."""
    return sorted_out(allowed_edges(), lambda spec: _read(spec) is not None)


def test_most_of_what_the_schema_allows_is_done(edges: tuple[list[Edge], list[Edge]]) -> None:
    fine, wrong = edges
    assert len(fine) > 2000
    assert len(wrong) < len(fine) / 5


def test_of_every_accepted_job_the_objects_are_made_and_read_back(edges: tuple[list[Edge], list[Edge]]) -> None:
    packs = [*accepted(packed(edges[0], READ_BYTES), lambda spec: _read(spec) is not None)]
    assert sum(len(pack.edges) for pack in packs) == len(edges[0])
    for pack in packs:
        job = _read(completed(pack.spec))
        assert job is not None
        first = job_config_map(job, 1, SETTINGS)
        made = pytorch_job(job, 1, SETTINGS)
        assert not is_edited(made)
        assert verification_job(job, 1, "s3://models/adapter", SETTINGS)["spec"]
        data = first["data"]
        assert load_job(data["job.yaml"], source="job.yaml").job == effective_job(job, SETTINGS)
        assert same_training(data["spec.json"], job)
        assert same_placement(data["placement.json"], job)
        # A second attempt trains what the first one did.
        assert job_config_map(continued(job, first), 2, SETTINGS)["data"]["job.yaml"] == data["job.yaml"]
