"""What an API server makes of a value and a structural schema, as far as it needs no server to know it.

It drops empty values, takes 4.0 for 4, knows int-or-string, and evaluates the CEL rule about the length of keys. The
tests on a real control plane show that it agrees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jsonschema

INT_OR_STRING = "x-kubernetes-int-or-string"


def accepts(node: Mapping[str, Any], value: Any) -> bool:
    """Whether a value fits a schema."""
    stored = as_stored(value)
    return jsonschema.Draft4Validator(_translated(node)).is_valid(stored) and _keys_fit(node, stored)


def as_stored(value: Any) -> Any:
    """A value as the server keeps it, where it keeps it."""
    if isinstance(value, Mapping):
        return {key: as_stored(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [as_stored(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _translated(node: Any) -> Any:
    if isinstance(node, list):
        return [_translated(inner) for inner in node]
    if not isinstance(node, Mapping):
        return node
    found = {key: _translated(inner) for key, inner in node.items()}
    if found.pop(INT_OR_STRING, None) is True:
        found["type"] = ["integer", "string"]
    if isinstance(pattern := found.get("pattern"), str):
        # In Go `$` is the end of the text; in Python also what is before a line break at its end.
        found["pattern"] = pattern.replace("$", r"\Z")
    return found


def _keys_fit(node: Mapping[str, Any], value: Any) -> bool:
    if isinstance(value, list):
        return all(_keys_fit(node.get("items", {}), inner) for inner in value)
    if not isinstance(value, Mapping):
        return True
    rules = [re.search(r"size\(key\) <= (\d+)", rule["rule"]) for rule in node.get("x-kubernetes-validations", [])]
    limits = [int(match.group(1)) for match in rules if match]
    inner_nodes = node.get("properties", {})
    values = node.get("additionalProperties", {})
    return all(len(key) <= limit for key in value for limit in limits) and all(
        _keys_fit(inner_nodes.get(key, values), inner) for key, inner in value.items()
    )
