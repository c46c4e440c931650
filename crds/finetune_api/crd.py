"""The CustomResourceDefinition, generated from the models: `python -m finetune_api.crd` prints it.

The API server takes structural schemas only: no $ref, one type per node, unions only as int-or-string or as values
without a type (`untyped.py`), no null. Every text, list and map has a bound, and so has the depth. Defaults stay out,
so that a job in the cluster is the text its author committed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import yaml

from finetune_api.crd_rules import RULES, key_length_rule
from finetune_api.job import GROUP, KIND, VERSION, FineTuneJob

PLURAL = "finetunejobs"

HEADER = """\
# Generated from crds/finetune_api by `python -m finetune_api.crd`: change the models, then `make generate`.
"""

LIST_KEYS = {
    ("status", "conditions"): ["type"],
    ("spec", "workers", "env"): ["name"],
    ("spec", "workers", "imagePullSecrets"): ["name"],
    ("spec", "workers", "volumes"): ["name"],
}
"""Lists whose entries are told apart by a key; all others are replaced as a whole."""

PRINTER_COLUMNS = [
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {
        "name": "Reason",
        "type": "string",
        "jsonPath": '.status.conditions[?(@.type=="Succeeded")].reason',
        "description": "Why the job is where it is, in one word.",
    },
    {"name": "Progress", "type": "integer", "jsonPath": ".status.progress.percent", "description": "Percent done."},
    {"name": "Loss", "type": "number", "jsonPath": ".status.progress.loss", "description": "Training loss per token."},
    {"name": "Model", "type": "string", "jsonPath": ".spec.model_id"},
    {"name": "Adapter", "type": "string", "jsonPath": ".status.adapter.uri", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]

_INT_OR_STRING = "x-kubernetes-int-or-string"
_UNCHECKED = "x-kubernetes-preserve-unknown-fields"
_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
)
_OF_UNTYPED = (*_KEPT, "multipleOf", "not", "anyOf", _INT_OR_STRING, _UNCHECKED)
"""What is kept of a node without a type, which is written as the API server takes it."""


def custom_resource_definition() -> dict[str, Any]:
    """The CRD as an object, keys in the order in which they are printed."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["all", "finetune"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": PRINTER_COLUMNS,
                    "schema": {"openAPIV3Schema": structural_schema()},
                }
            ],
        },
    }


def structural_schema() -> dict[str, Any]:
    """The OpenAPI v3 schema of a FineTuneJob, with its CEL rules."""
    generated = FineTuneJob.model_json_schema(by_alias=True)
    definitions = generated["$defs"]
    name = {key: value for key, value in definitions["Metadata"]["properties"]["name"].items() if key != "description"}
    # Of metadata a CRD may restrict the name only; the server knows the rest.
    generated["properties"]["metadata"] = {"type": "object", "properties": {"name": name}}
    schema = flatten(generated, definitions, ())
    schema["required"] = ["spec"]
    # Where no operator has looked yet, kstatus (Flux, Helm 4) would take a job without a status for one that is done.
    schema["properties"]["status"]["default"] = {"observedGeneration": 0}
    for key in ("apiVersion", "kind"):
        del schema["properties"][key]["enum"]
    for path, rules in RULES.items():
        node = schema
        for key in path:
            node = node["items"] if key == "[]" else node["properties"][key]
        node["x-kubernetes-validations"] = rules
    return schema


def flatten(node: Mapping[str, Any], definitions: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """`node` of pydantic's JSON schema as a structural one.

    Args:
        node: the schema at `path`.
        definitions: pydantic's `$defs`, which `$ref` points into.
        path: keys from the top, for lists that are maps.
    """
    node = _resolved(node, definitions)
    kept = {"description": node["description"]} if "description" in node else {}
    if node.get(_INT_OR_STRING) or node.get(_UNCHECKED):
        out = {key: node[key] for key in _OF_UNTYPED if key in node}
        return out | {
            key: flatten(node[key], definitions, path) for key in ("items", "additionalProperties") if key in node
        }
    out = {key: node[key] for key in _KEPT if key in node} | kept
    if "const" in node:
        out["enum"] = [node["const"]]
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in node:
            out |= {bound: node[exclusive], exclusive: True}
    match node.get("type"):
        case "object" if "properties" in node:
            out["properties"] = {
                key: flatten(inner, definitions, (*path, key)) for key, inner in node["properties"].items()
            }
            if node.get("required"):
                out["required"] = list(node["required"])
        case "object":
            values = out["additionalProperties"] = flatten(node["additionalProperties"], definitions, (*path, "{}"))
            if not values.get(_UNCHECKED):
                out["x-kubernetes-validations"] = [key_length_rule(node["propertyNames"]["maxLength"])]
        case "array":
            out["items"] = flatten(node["items"], definitions, (*path, "[]"))
            if keys := LIST_KEYS.get(path):
                out |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": keys}
            else:
                out["x-kubernetes-list-type"] = "atomic"
        case None:
            raise ValueError(f"{'.'.join(path)} has no single type, so the API server would refuse the schema.")
    return out


def _resolved(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """`node` without $ref, without null, and with a union of objects as one object of all their keys."""
    if "$ref" in node:
        target = _resolved(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
        return target | {key: value for key, value in node.items() if key != "$ref"}
    branches = node.get("anyOf") or node.get("oneOf")
    if branches is None or node.get(_INT_OR_STRING) or node.get(_UNCHECKED):
        return dict(node)
    rest = {key: value for key, value in node.items() if key not in ("anyOf", "oneOf")}
    kinds = [_resolved(branch, definitions) for branch in branches if branch.get("type") != "null"]
    if len(kinds) == 1:
        return kinds[0] | rest
    if all("properties" in kind for kind in kinds):
        # Which keys go together is then said by a CEL rule.
        properties = {key: value for kind in kinds for key, value in kind["properties"].items()}
        return {"type": "object", "properties": properties} | rest
    return rest


class _Dumper(yaml.SafeDumper):
    """Without aliases: the file is read by people."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  # PyYAML's signature
        return True


def as_yaml() -> str:
    """The file's text."""
    text = yaml.dump(custom_resource_definition(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return HEADER + text


if __name__ == "__main__":
    sys.stdout.write(as_yaml())
