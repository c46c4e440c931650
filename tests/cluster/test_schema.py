"""What the real API server makes of the schema: what it refuses to store, and what its rules see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.affinity import Affinity
from finetune_api.crd import structural_schema
from tests.api.extremes import Path, at, nodes
from tests.cluster.api import Api, ApiError, Object
from tests.cluster.scene import SPEC, manifest

SCHEMA = structural_schema()["properties"]["spec"]
UNCHECKED = "x-kubernetes-preserve-unknown-fields"

UNTYPED = [path for path, node in nodes(SCHEMA) if node.get(UNCHECKED)]
LEVELS = 1100
"""More than orjson reads, and about what Python's own parser of JSON does."""
MARK = "<deep>"
DEEP = {"[]": "[" * LEVELS + "]" * LEVELS, "{}": '{"a":' * LEVELS + "1" + "}" * LEVELS}


def _id(path: Path) -> str:
    return ".".join(path)


@pytest.mark.parametrize("kind", DEEP)
def test_what_is_nested_without_end_is_stored_nowhere(api: Api, kind: str) -> None:
    url = f"/apis/finetune.dev/v1alpha1/namespaces/{api.namespace}/finetunejobs"
    said = {}
    for path in UNTYPED:
        body = json.dumps(manifest("deep", **{path[0]: at(path, MARK, SCHEMA)[path[0]]}))
        content = body.replace(f'"{MARK}"', DEEP[kind])
        response = api.http.post(url, content=content, headers={"Content-Type": "application/json"})
        said[_id(path)] = (response.status_code, f"spec.{path[0]}" in response.text)
    assert {"deepspeed", "generation_config", "logger", "lora_config"} <= {path[0] for path in UNTYPED}
    assert said == dict.fromkeys(said, (422, True))


def _keys(node: Object, schemas: Object, path: Path = ()) -> Iterator[Path]:
    """Every key of an object of Kubernetes' own API, from the server's description of it."""
    for part in (node, *node.get("allOf", [])):
        if "$ref" in part:
            yield from _keys(schemas[part["$ref"].rpartition("/")[2]], schemas, path)
        for key, inner in part.get("properties", {}).items():
            yield (*path, key)
            yield from _keys(inner, schemas, (*path, key))
        for entries in ("items", "additionalProperties"):
            if entries in part:
                yield from _keys(part[entries], schemas, (*path, "[]" if entries == "items" else "{}"))


def test_affinity_has_every_key_that_kubernetes_has(api: Api) -> None:
    schemas = api.request("GET", "/openapi/v3/api/v1")["components"]["schemas"]
    theirs = {*_keys(schemas["io.k8s.api.core.v1.Affinity"], schemas)}
    affinity = SCHEMA["properties"]["workers"]["properties"]["affinity"]
    ours = {path for path, _ in nodes(affinity) if path and path[-1] not in ("[]", "{}")}
    assert ours == theirs
    required = {_id(path): set(node["required"]) for path, node in nodes(affinity) if node.get("required")}
    assert required["podAffinity.requiredDuringSchedulingIgnoredDuringExecution.[]"] == {"topologyKey"}


AFFINITY: Object = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a100", "h100"]}]},
                {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["broken"]}]},
            ]
        },
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "preference": {"matchExpressions": [{"key": "age", "operator": "Lt", "values": ["5"]}]}}
        ],
    },
    "podAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "cache"}}, "namespaceSelector": {}}
        ]
    },
    "podAntiAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {
                "weight": 1,
                "podAffinityTerm": {
                    "topologyKey": "kubernetes.io/hostname",
                    "namespaces": ["other"],
                    "labelSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]},
                    "matchLabelKeys": ["team"],
                    "mismatchLabelKeys": ["tenant"],
                },
            }
        ]
    },
}


def test_an_affinity_is_stored_and_read_as_it_was_written(api: Api) -> None:
    stored = api.create(manifest("guard", workers={"affinity": AFFINITY}))["spec"]["workers"]["affinity"]
    assert stored == AFFINITY
    read = Affinity.model_validate(stored, by_alias=True, by_name=False)
    assert read.model_dump(by_alias=True, exclude_none=True) == AFFINITY


SEEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "target_modules": ({"lora_config": {"target_modules": "a"}}, {"lora_config": {"target_modules": ["a"]}}),
    "layers_to_transform": (
        {"lora_config": {"target_modules": ["a"], "layers_to_transform": [1]}},
        {"lora_config": {"target_modules": ["a"], "layers_to_transform": [2]}},
    ),
    "provider_config": (
        {"logger": {"provider": "wandb", "provider_config": {"config": {"a": [1]}}}},
        {"logger": {"provider": "wandb", "provider_config": {"config": {"a": [2]}}}},
    ),
    "generate_kwargs": (
        {"generation_config": {"generate_kwargs": {"a": {"b": 1}}}},
        {"generation_config": {"generate_kwargs": {"a": {"b": 2}}}},
    ),
}


@pytest.mark.parametrize(("before", "after"), SEEN.values(), ids=list(SEEN))
def test_the_rules_see_a_change_of_a_value_without_a_type(
    api: Api, before: dict[str, Any], after: dict[str, Any]
) -> None:
    api.create(manifest("guard", **before))
    (key,) = after
    with pytest.raises(ApiError, match=f"{key} is immutable"):
        api.patch("FineTuneJob", "guard", {"spec": {key: after[key]}})
    assert api.get("FineTuneJob", "guard")["spec"][key] == before[key]


def test_keys_of_a_map_are_bounded(api: Api) -> None:
    with pytest.raises(ApiError, match="a key may have at most 317 characters"):
        api.create(manifest("guard", workers={"nodeSelector": {"k" * 318: "a"}}))
    assert SPEC["workers"]
