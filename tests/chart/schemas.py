"""JSON schemas for kubeconform, of the API server that runs: Kubernetes' own kinds and ours, in its version."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.cluster.api import Api

LOCATION = "{{ .ResourceKind }}-{{ .Group }}-{{ .ResourceAPIVersion }}.json"
"""Where kubeconform looks for a kind in the folder."""

_GROUP_DOCUMENT = re.compile(r"^apis?/.*v\d\w*$")


def write_schemas(api: Api, folder: Path) -> None:
    """A file for each kind of each group, with what it refers to inside."""
    for name, place in api.request("GET", "/openapi/v3")["paths"].items():
        if not _GROUP_DOCUMENT.match(name):
            continue
        schemas = api.request("GET", place["serverRelativeURL"])["components"]["schemas"]
        strict = {key: _strict(schema) for key, schema in schemas.items()}
        for key, schema in schemas.items():
            for kind in schema.get("x-kubernetes-group-version-kind", ()):
                document = {"$ref": f"#/components/schemas/{key}", "components": {"schemas": strict}}
                # kubeconform takes the version for the group where there is none.
                file = f"{kind['kind']}-{kind['group'] or kind['version']}-{kind['version']}.json".lower()
                (folder / file).write_text(json.dumps(document))


def _strict(node: Any) -> Any:
    """The schema, which from now on refuses keys that it does not know."""
    if isinstance(node, list):
        return [_strict(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    strict = {key: _strict(inner) for key, inner in node.items()}
    if isinstance(node.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in node:
        strict.setdefault("additionalProperties", False)
    return strict
