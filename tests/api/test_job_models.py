"""The models themselves: prose, bounds, and the names that the rest of the project relies on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from finetune_api.crd import structural_schema
from finetune_api.job import FineTuneJob, FineTuneJobSpec, FineTuneJobStatus
from finetune_api.lora import LoraConfig
from finetune_api.status import Condition
from finetune_api.workers import Workers

SCHEMA = structural_schema()["properties"]


def _fields(node: dict[str, Any], path: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for key, inner in node.get("properties", {}).items():
        yield path, key, inner
        yield from _fields(inner, f"{path}.{key}")
        yield from _fields(inner.get("items", {}), f"{path}.{key}[]")


FIELDS = [*_fields(SCHEMA["spec"], "spec"), *_fields(SCHEMA["status"], "status")]


@pytest.mark.parametrize(("path", "key", "node"), FIELDS, ids=[f"{path}.{key}" for path, key, _ in FIELDS])
def test_a_field_is_described_in_prose_that_begins_with_its_name(path: str, key: str, node: dict[str, Any]) -> None:
    prose = node["description"]
    assert re.match(rf"{key}\b", prose)
    assert prose.endswith(".")


@pytest.mark.parametrize("model", [FineTuneJobSpec, LoraConfig, Workers])
def test_prose_and_model_agree_on_a_constant_default(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if isinstance(field.default, bool | int | float | str):
            prose = re.search(r"Default: (.*?)(?:; |\.$|, so )", field.description or "")
            assert prose is not None, name
            assert prose.group(1) in _spellings(field.default), name


def _spellings(value: bool | float | str) -> set[str]:
    if isinstance(value, bool):
        return {str(value).lower()}
    return (
        {str(value), "1e-4"} if value == 1e-4 else {str(value), f"{value:g}" if not isinstance(value, str) else value}
    )


def test_keys_of_kubernetes_are_spelled_its_way_in_yaml_and_pythons_in_python() -> None:
    spec = {
        "model_id": "m",
        "train_path": "t",
        "activeDeadlineSeconds": 5,
        "ttlSecondsAfterFinished": 0,
        "backoffLimit": 1,
        "workers": {"gpusPerNode": 2, "priorityClassName": "high"},
        "secrets": {"huggingFace": {"name": "hf"}, "objectStore": {"name": "s3"}},
    }
    job = FineTuneJob.model_validate({"metadata": {"name": "a"}, "spec": spec})
    found = job.spec
    assert (found.active_deadline_seconds, found.ttl_seconds_after_finished, found.backoff_limit) == (5, 0, 1)
    assert (found.workers.gpus_per_node, found.workers.priority_class_name) == (2, "high")
    assert found.secrets.hugging_face is not None
    assert found.secrets.hugging_face.key == "token"
    assert job.model_dump(exclude_unset=True)["spec"] == spec


def test_whole_floats_are_whole_numbers_as_they_are_to_the_api_server() -> None:
    spec = FineTuneJobSpec.model_validate({"model_id": "m", "train_path": "t", "context_length": 4096.0})
    assert spec.context_length == 4096
    assert isinstance(spec.context_length, int)


def test_a_status_is_read_even_when_a_newer_version_wrote_it() -> None:
    status = FineTuneJobStatus.model_validate(
        {
            "observedGeneration": 2,
            "phase": "Running",
            "progress": {"percent": 40, "etaSeconds": 12, "new": 1},
            "attempts": [{"number": 1, "reason": "OutOfMemory", "exitCode": 16}],
            "new": {},
        }
    )
    assert status.progress is not None
    assert (status.progress.percent, status.progress.eta_seconds) == (40, 12)
    assert status.attempts[0].exit_code == 16
    assert "new" not in status.model_dump()


def test_a_condition_needs_a_reason_for_machines() -> None:
    with pytest.raises(ValidationError):
        Condition(type="Succeeded", status="Unknown", reason="not a word", last_transition_time="2026-01-01T00:00:00Z")
