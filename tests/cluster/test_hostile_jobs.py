"""Jobs at every edge of what the schema allows, beside ten that mean it: each costs only itself.

No test of single values: what is tried is generated from the schema, and from what the API server lets stand in
metadata, which no schema bounds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from finetune_api.load import load_manifest
from finetune_api.problem import MOST
from finetune_operator.desired import job_problems
from finetune_operator.names import JOB_NAME_LABEL, child_name
from tests.cluster.api import Api, Object, condition_of, wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.hostile import Pack, accepted, allowed_edges, completed, packed, sorted_out, thinned
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import manifest
from tests.operator.desired.built import SETTINGS

HONEST = 10
READ_BYTES = 100_000
"""Of a spec: below what the operator refuses to read, so that it gets to all that is in it."""
TEXTS_EACH = 2
MOST_WRITES = 8
"""About one job: its ConfigMap, its PyTorchJob, a few statuses."""
MOST_EVENTS = 2 * (MOST + 1) + 4
"""About one job: the problems and the notices that are told of one, and what becomes of its attempt."""
EDGES_LABEL = {"edges": "yes"}
DEEP_LEVELS = 9_000
"""The API server takes managedFields about so deep, in any kind."""


def test_jobs_at_every_edge_of_the_schema_cost_only_themselves(operator_factory: OperatorFactory, api: Api) -> None:
    operator = operator_factory(retry_base_seconds=600, retry_limit_seconds=600)
    operator.start()
    pid = operator.server.pid
    calm = _honest(api, "calm")
    _wait_created(api, calm)
    _wait_idle(operator)
    packs = _packs()
    hostile = [_create(api, f"edge-{number:03d}", pack.spec) for number, pack in enumerate(packs)]
    odd = [_create_raw(api, name, content) for name, content in _odd_metadata().items()]
    honest = _honest(api, "honest")
    _wait_created(api, honest)
    _wait_created(api, odd)
    verdicts = wait_until(lambda: _verdicts(api), lambda found: len(found) == len(hostile), 120)
    _wait_idle(operator)
    # Others got what they get without them, and no more was asked for it.
    assert _requests(operator, honest) == _requests(operator, calm)
    # Each was judged as it had to be, and cost a few writes.
    refused = {job["metadata"]["name"] for job in hostile if not _is_accepted(job["spec"])}
    assert {name for name, reason in verdicts.items() if reason == "InvalidSpec"} == refused
    assert len(refused) < len(hostile) / 2
    costs = _costs(operator, [*hostile, *odd])
    assert max(costs.values()) <= MOST_WRITES, costs
    events = Counter(event["involvedObject"]["name"] for event in api.list("Event"))
    assert max(events[job["metadata"]["name"]] for job in hostile) <= MOST_EVENTS, events.most_common(3)
    # And nobody fell over.
    assert operator.server.pid == pid
    assert operator.running
    log = operator.log()
    assert "unforeseen" not in log
    assert all(line.isprintable() for line in log.splitlines())
    assert sum(len(pack.edges) for pack in packs) > 700


def _packs() -> list[Pack]:
    """What is accepted together, so that all of it is made something of; and what is refused, for several reasons."""
    edges = [edge for edge in thinned(allowed_edges(), TEXTS_EACH) if edge.path != ("workers", "nodes")]
    # A thousand pods would be the training operator's to make, and no matter of what an object says.
    fine, wrong = sorted_out(edges, _is_accepted)
    return [*accepted(packed(fine, READ_BYTES), _is_accepted), *packed(wrong, READ_BYTES)]


def _is_accepted(spec: Object) -> bool:
    metadata = {"name": "edge", "namespace": "team-a", "uid": "7dd8f03f-1111-2222-3333-444444444444"}
    job = load_manifest({**manifest("edge"), "metadata": metadata, "spec": spec}).job
    return job is not None and job_problems(job, SETTINGS) == []


def _honest(api: Api, name: str) -> list[Object]:
    return [api.create(manifest(f"{name}-{number}")) for number in range(HONEST)]


def _create(api: Api, name: str, spec: Mapping[str, Any]) -> Object:
    body = manifest(name)
    return api.create({**body, "metadata": {"name": name, "labels": EDGES_LABEL}, "spec": completed(spec)})


def _odd_metadata() -> dict[str, str]:
    """Bodies of jobs that are honest but for their metadata, by their names."""
    deep = '{"f:a":' * DEEP_LEVELS + "{}" + "}" * DEEP_LEVELS
    entry = {"manager": "x", "operation": "Update", "apiVersion": "finetune.dev/v1alpha1", "fieldsType": "FieldsV1"}
    odd: dict[str, Object] = {
        "deep-fields": {"managedFields": [{**entry, "fieldsV1": "DEEP"}]},
        "annotations": {"annotations": {f"a{number}": "\U0001f600\x00\u202e" * 3000 for number in range(8)}},
        "labels": {"labels": {f"label-{number}": "v" * 63 for number in range(3000)}},
        "finalizers": {"finalizers": [f"example.com/f{number}" for number in range(100)]},
        "n" * 63: {},
    }
    return {
        name: json.dumps({**manifest(name), "metadata": {"name": name, **metadata}}).replace('"DEEP"', deep)
        for name, metadata in odd.items()
    }


def _create_raw(api: Api, name: str, content: str) -> Object:
    """What a parser in Python cannot read is created all the same; of the answer only name and uid are taken."""
    url = f"/apis/finetune.dev/v1alpha1/namespaces/{api.namespace}/finetunejobs"
    response = api.http.post(url, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 201, response.text[:500]
    uid = response.text.partition('"uid":"')[2].partition('"')[0]
    return {"metadata": {"name": name, "uid": uid}}


def _wait_created(api: Api, jobs: Iterable[Object]) -> None:
    """Return once each of the jobs has its PyTorchJob."""
    awaited = {job["metadata"]["name"] for job in jobs}
    wait_until(
        lambda: {made["metadata"]["labels"].get(JOB_NAME_LABEL) for made in api.list("PyTorchJob")},
        lambda found: awaited <= found,
        60,
    )


def _wait_idle(operator: OperatorProcess) -> None:
    wait_until(lambda: operator.metrics().count("finetune_queue_depth 0.0"))


def _verdicts(api: Api) -> dict[str, str]:
    """The reason that each job's status gives, by the job's name."""
    jobs = api.list("FineTuneJob", labels="edges=yes")
    found = {job["metadata"]["name"]: condition_of(job, "Succeeded") for job in jobs}
    return {name: condition["reason"] for name, condition in found.items() if condition and condition["message"]}


def _costs(operator: OperatorProcess, jobs: Iterable[Object]) -> Counter[str]:
    """How many writes each job led to."""
    names: dict[str, str] = {}
    for job in jobs:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        names |= {name: name, child_name(name, uid, 1): name}
    return Counter(names[request.name] for request in operator.writes() if request.name in names)


def _requests(operator: OperatorProcess, jobs: Iterable[Object]) -> Counter[tuple[str, str, int]]:
    """What was asked about the jobs until each had its PyTorchJob: verbs, kinds and answers."""
    asked = operator.requests()
    found: Counter[tuple[str, str, int]] = Counter()
    for job in jobs:
        name = job["metadata"]["name"]
        about = [request for request in asked if request.name in (name, child_name(name, job["metadata"]["uid"], 1))]
        kinds = [(request.verb, request.resource, request.code) for request in about]
        found.update(kinds[: kinds.index(("create", "pytorchjobs", 201)) + 1])
    return found


@pytest.fixture(autouse=True)
def _without_finalizers(api: Api) -> Any:
    """Nobody else would take them off, and the namespace would stay."""
    yield
    if api.find("FineTuneJob", "finalizers"):
        api.patch("FineTuneJob", "finalizers", {"metadata": {"finalizers": None}})
