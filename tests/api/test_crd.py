"""The CRD: generated, structural, bounded, and with a rule for everything that must not change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from finetune_api.crd import as_yaml, custom_resource_definition, structural_schema
from finetune_api.crd_rules import RULES
from finetune_api.defaults import effective_job
from finetune_api.job import FineTuneJobSpec
from finetune_api.load import load_job_file
from finetune_api.reference import reference
from tests.api.jobs import manifest

ROOT = Path(__file__).parents[2]
SCHEMA = structural_schema()

ALLOWED = {
    "description",
    "type",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "properties",
    "required",
    "items",
    "additionalProperties",
    "multipleOf",
    "not",
    "anyOf",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-validations",
}

MAY_CHANGE = {
    # How it lives, at any time.
    "suspend",
    "backoffLimit",
    "activeDeadlineSeconds",
    "ttlSecondsAfterFinished",
    # Where it runs, while suspended or waiting: the operator's to judge.
    "workers",
    "secrets",
    "num_devices",
    "worker_resources",
    # Without effect or refused.
    "deepspeed",
    "trainer_resources",
    "flash_attention_2",
    "liger_kernel",
    "num_data_blocks_per_device",
    "dataset_size_scaling_factor",
    "custom_model_tag",
    "forward_checkpoint_config",
    "classifier_config",
    "preference_tuning_config",
    # Of two types, which CEL cannot read: the operator compares them with the first attempt.
    "initial_base_model_ckpt_path",
    "initial_adapter_model_ckpt_path",
}


def _nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for key, inner in node.get("properties", {}).items():
        yield from _nodes(inner, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from _nodes(node[key], f"{path}[]")


NODES = [*_nodes(SCHEMA)]


def test_the_committed_files_are_those_that_are_generated() -> None:
    assert (ROOT / "crds" / "finetunejobs.yaml").read_text() == as_yaml()
    assert (ROOT / "docs" / "reference" / "job.md").read_text() == reference()


def test_the_file_is_read_back_as_what_was_generated() -> None:
    assert yaml.safe_load(as_yaml()) == custom_resource_definition()


@pytest.mark.parametrize(("path", "node"), NODES, ids=[path for path, _ in NODES])
def test_a_node_is_structural(path: str, node: dict[str, Any]) -> None:
    # What a job is before anybody looked at it is the one default: of a spec its author's text is all there is.
    assert node.keys() <= (ALLOWED | {"default"} if path == ".status" else ALLOWED)
    either = node.get("x-kubernetes-int-or-string") or node.get("x-kubernetes-preserve-unknown-fields")
    assert either or node["type"] in ("object", "array", "string", "integer", "number", "boolean")
    assert not ("properties" in node and "additionalProperties" in node)
    assert set(node.get("required", [])) <= node.get("properties", {}).keys()
    if node.get("x-kubernetes-int-or-string"):
        assert "type" not in node


def test_kubectl_get_shows_what_people_ask_for() -> None:
    (version,) = custom_resource_definition()["spec"]["versions"]
    columns = version["additionalPrinterColumns"]
    names = ["PHASE", "REASON", "PROGRESS", "LOSS", "MODEL", "ADAPTER", "AGE"]
    assert [column["name"].upper() for column in columns] == names
    assert [column.get("priority", 0) for column in columns] == [0, 0, 0, 0, 0, 1, 0]
    paths = {path for path, _ in NODES}
    elsewhere = {column["jsonPath"] for column in columns} - paths
    assert elsewhere == {".metadata.creationTimestamp", '.status.conditions[?(@.type=="Succeeded")].reason'}
    assert version["subresources"] == {"status": {}}


def test_conditions_are_a_map_by_type() -> None:
    conditions = dict(NODES)[".status.conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]
    assert "type" in conditions["items"]["required"]


def test_what_is_trained_is_immutable_and_the_rest_is_not() -> None:
    rules = [rule for rule in RULES[("spec",)] if "oldSelf" in rule["rule"]]
    fixed = {rule["fieldPath"].removeprefix(".") for rule in rules}
    keys = {field.alias or name for name, field in FineTuneJobSpec.model_fields.items()}
    assert fixed == keys - MAY_CHANGE
    for rule in rules:
        key = rule["fieldPath"].removeprefix(".")
        assert rule["message"].startswith(f"{key} is immutable")
        assert rule["message"].endswith("create a new FineTuneJob.")
        if key not in SCHEMA["properties"]["spec"]["required"]:
            assert rule["rule"].startswith(f"has(self.{key}) == has(oldSelf.{key}) && ")


def test_rules_name_only_fields_that_cel_can_read() -> None:
    for path, rules in RULES.items():
        node = SCHEMA
        for key in path:
            node = node["items"] if key == "[]" else node["properties"][key]
        for rule in rules:
            for chain in re.findall(r"\b(?:self|oldSelf)\.([A-Za-z_]+(?:\.[A-Za-z_]+)*)", rule["rule"]):
                here = node
                for name in chain.split("."):
                    if name in ("matches", "startsWith", "contains"):
                        break
                    here = here["properties"][name]
                    assert "type" in here, f"{chain} has no type, so CEL does not see it"
            assert "\n" not in rule["message"]
            assert len(rule["message"]) <= 2048
            assert rule.get("fieldPath", ".spec").removeprefix(".") in {"spec", *node["properties"]}


@pytest.mark.parametrize("name", ["llama-guard-2", "mixtral-8x7b-lora", "gemma-2-27b-custom", "llama-3-8b-full"])
def test_a_job_that_is_accepted_fits_the_schema_as_written_and_filled_in(name: str) -> None:
    result = load_job_file(Path(__file__).parent / "llmforge_yamls" / f"{name}.yaml")
    assert result.job is not None
    for accepted in (result.job, effective_job(result.job)):
        _validator().validate(accepted.model_dump(exclude_none=True, mode="json"))


@pytest.mark.parametrize(
    "changes",
    [{"num_epochs": "3"}, {"num_epochs": 0}, {"task": "x"}, {"learning_rate": 0}, {"workers": {"nodes": 2000}}],
)
def test_the_schema_refuses_what_the_models_refuse(changes: dict[str, Any]) -> None:
    assert not _validator().is_valid(manifest(**changes))


def _validator() -> jsonschema.Draft4Validator:
    # Draft 4 has exclusiveMinimum as a flag, as OpenAPI v3.0 does.
    return jsonschema.Draft4Validator(SCHEMA)
