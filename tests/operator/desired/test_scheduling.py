"""A further attempt prefers other machines than those that failed, and changes nothing of what its author wrote."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.desired import pytorch_job, verification_job
from finetune_operator.desired.fingerprint import fingerprint
from tests.operator.desired.built import SETTINGS, stored

WISHES = "preferredDuringSchedulingIgnoredDuringExecution"
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
AVOID = ("node-7", "node-3")


def avoiding(*nodes: str) -> dict[str, Any]:
    """The wish for others."""
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    return {"weight": 100, "preference": {"matchFields": fields}}


def term(label: str, weight: int = 1) -> dict[str, Any]:
    """A wish of the author's."""
    expressions = [{"key": label, "operator": "In", "values": ["x"]}]
    return {"weight": weight, "preference": {"matchExpressions": expressions}}


def affinity_of(affinity: dict[str, Any] | None, avoid: tuple[str, ...]) -> Any:
    """The affinity of the workers' pods."""
    job = stored(workers={"affinity": affinity} if affinity is not None else {})
    made = pytorch_job(job, 2, SETTINGS, avoid)
    verification = verification_job(job, 2, "s3://models/adapter", SETTINGS, avoid)
    found = made["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"].get("affinity")
    assert verification["spec"]["template"]["spec"].get("affinity") == found
    return found


REQUIREMENT = {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]}}
PODS = {"podAntiAffinity": {WISHES: [{"weight": 5, "podAffinityTerm": {"topologyKey": "zone"}}]}}


@pytest.mark.parametrize(
    ("written", "made"),
    [
        (None, {"nodeAffinity": {WISHES: [avoiding(*AVOID)]}}),
        ({}, {"nodeAffinity": {WISHES: [avoiding(*AVOID)]}}),
        (PODS, {**PODS, "nodeAffinity": {WISHES: [avoiding(*AVOID)]}}),
        ({"nodeAffinity": REQUIREMENT}, {"nodeAffinity": {**REQUIREMENT, WISHES: [avoiding(*AVOID)]}}),
        (
            {"nodeAffinity": {**REQUIREMENT, WISHES: [term("a", 50), term("b")]}, **PODS},
            {"nodeAffinity": {**REQUIREMENT, WISHES: [term("a", 50), term("b"), avoiding(*AVOID)]}, **PODS},
        ),
    ],
)
def test_a_wish_is_added_to_what_is_written(written: dict[str, Any] | None, made: dict[str, Any]) -> None:
    before = copy.deepcopy(written)
    assert affinity_of(written, AVOID) == made
    assert written == before
    assert affinity_of(written, ()) == (written or None)


labels = st.sampled_from(["a", "b", "c"])
wishes = st.lists(st.builds(term, labels, st.integers(1, 100)), max_size=3)
written = st.fixed_dictionaries(
    {},
    optional={
        "nodeAffinity": st.fixed_dictionaries({}, optional={WISHES: wishes, REQUIRED: st.just(REQUIREMENT[REQUIRED])}),
        "podAntiAffinity": st.just(PODS["podAntiAffinity"]),
    },
)


@given(written, st.lists(st.sampled_from(["n1", "n2", "n3"]), unique=True, min_size=1).map(tuple))
def test_without_the_wish_it_is_what_was_written(affinity: dict[str, Any], avoid: tuple[str, ...]) -> None:
    made = json.loads(json.dumps(affinity_of(affinity, avoid)))
    assert made["nodeAffinity"][WISHES].pop() == avoiding(*avoid)
    had = affinity.get("nodeAffinity", {})
    if WISHES not in had:
        assert made["nodeAffinity"].pop(WISHES) == []
    if "nodeAffinity" not in affinity:
        assert made.pop("nodeAffinity") == {}
    assert made == affinity


def test_where_a_pod_had_better_run_is_no_edit_by_hand() -> None:
    """Or an operator that does not know the wish yet would take it for one."""
    made = [pytorch_job(stored(), 2, SETTINGS, avoid) for avoid in ((), AVOID)]
    assert fingerprint(made[0]) == fingerprint(made[1])
