"""The first attempt's ConfigMap, which tenants may write anew, gives them no more rights."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.job_file import job_yaml
from finetune_api.load import load_job
from finetune_operator.desired import effective_job
from finetune_operator.desired.continuation import YAML_LIMIT_BYTES, continued
from tests.operator.desired.built import SETTINGS, config_map, stored
from tests.operator.desired.test_job_config import LARGEST
from tests.operator.steps import counted


@pytest.mark.parametrize("written", [{}, {"trust_remote_code": False}])
@pytest.mark.parametrize("attempt", [1, 2])
def test_whoever_writes_the_first_config_map_anew_does_not_let_a_models_own_code_run(
    written: dict[str, Any], attempt: int
) -> None:
    forged = config_map(stored(trust_remote_code=True))
    job = continued(stored(**written), forged)
    made = load_job(config_map(job, attempt=attempt)["data"]["job.yaml"], source="job.yaml").job
    assert made is not None
    assert made.spec.trust_remote_code is False


HALF_MIB = 1 << 19
HOSTILE_JSON: dict[str, str] = {
    "no JSON but YAML": "{a: [" + "1," * (HALF_MIB - 10) + "1]}",
    "no JSON at its end": '{"a":[' + "[]," * (HALF_MIB // 2),
    "lists": '{"a":[' + "[]," * (HALF_MIB // 2) + "1]}",
    "numbers": '{"a":[' + "1.5," * (HALF_MIB // 3) + "1]}",
    "a key again and again": "{" + '"a":{"b":1},' * (HALF_MIB // 9) + '"a":1}',
    "keys": json.dumps({f"{number}": {} for number in range(HALF_MIB // 10)}),
    "unknown keys": json.dumps({"metadata": {f"{number}": 1 for number in range(10_000)}, "spec": {}}),
    "levels": '{"a":' + "[" * HALF_MIB,
    "a text that does not end": '{"' + '\\"' * HALF_MIB,
}
HOSTILE_YAML: dict[str, str] = {
    "open brackets": "a: " + "[" * 8000,
    "brackets": "a: [" + ("[" * 90 + "]" * 90 + ",") * 45,
    "open braces": "a: " + "{" * 1000,
    "empty keys": "a: [" + "?," * 4000,
    "numbers": "a: [" + "1," * 4000,
    "items": "a:\n" + "-\n" * 4000,
    "items of items": "- - a\n" * 1300,
    "keys": "".join(f"{number:x}:\n" for number in range(1600)),
}
"""What whoever may write ConfigMaps can put in the place of the first one's record."""

STEPS = 450_000
"""Calls that reading a record may take; the largest of ours takes 400 000."""


@pytest.mark.parametrize("text", [*HOSTILE_JSON.values(), *HOSTILE_YAML.values()], ids=[*HOSTILE_JSON, *HOSTILE_YAML])
def test_a_record_that_is_none_of_ours_costs_little_to_refuse(text: str) -> None:
    if not text.startswith("{"):
        text = text[:YAML_LIMIT_BYTES]
    job = stored()
    made, steps = counted(lambda: continued(job, {"data": {"job.yaml": text}}))
    assert made == job
    assert steps < STEPS


MANY: dict[str, dict[str, Any]] = {
    "maps": {key: {f"{number}": {} for number in range(98)} for key in "abcd"},
    "lists": {key: [[]] * 98 for key in "abcdef"},
    "numbers": {key: [1] * 98 for key in "abcdefg"},
    "lists in lists": {key: [[1], []] * 49 for key in "abcdef"},
}


@pytest.mark.parametrize("deepspeed", MANY.values(), ids=list(MANY))
def test_a_record_of_an_earlier_version_is_read_however_many_values_its_yaml_holds(deepspeed: dict[str, Any]) -> None:
    job = stored(deepspeed=deepspeed)
    record = job_yaml(effective_job(job, SETTINGS))
    assert 7000 < len(record) <= YAML_LIMIT_BYTES
    assert continued(stored(), {"data": {"job.yaml": record}}).spec.deepspeed == job.spec.deepspeed


@pytest.mark.parametrize("spec", LARGEST.values(), ids=list(LARGEST))
def test_the_largest_record_of_ours_is_read(spec: dict[str, Any]) -> None:
    job = stored(**spec)
    made, steps = counted(lambda: continued(stored(workers=spec.get("workers", {})), config_map(job)))
    assert made.spec.deepspeed == job.spec.deepspeed
    assert made.spec.output is not None
    assert steps < STEPS
