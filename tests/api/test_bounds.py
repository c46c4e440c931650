"""Nothing in the schema is without bounds, and schema and models draw the line at the same place.

The API server stores whatever the schema takes, for everybody who lists the kind to parse: JSON nested a thousand deep
ends many a parser. So the claim is about every node, of the spec and of the status.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from finetune_api.crd import flatten, structural_schema
from finetune_api.fields import LabelMap
from finetune_api.job import FineTuneJobSpec
from finetune_api.lora import Initialization, Layers, Modules
from finetune_api.training import WeightsSource
from finetune_api.untyped import FREE_LEVELS, FlatObject, FreeObject
from finetune_api.workers import Quantities, Quantity
from tests.api.extremes import Node, Path, at, beyond, edges, nested, nodes
from tests.api.jobs import spec
from tests.api.server import accepts, as_stored

SCHEMA = structural_schema()["properties"]
SPEC: Node = SCHEMA["spec"]
UNCHECKED = "x-kubernetes-preserve-unknown-fields"
DEEPEST = 12
"""Objects and lists within each other in a spec; parsers of JSON take from 1000 on offence."""

NODES = [(("spec", *path), node) for path, node in nodes(SPEC)] + [
    (("status", *path), node) for path, node in nodes(SCHEMA["status"])
]


def _name(value: Any) -> str:
    return ".".join(value) if isinstance(value, tuple) else ""


@pytest.mark.parametrize(("path", "node"), NODES, ids=_name)
def test_a_node_has_bounds(path: Path, node: Node) -> None:
    kind = node.get("type")
    if kind is None:
        _without_a_type(node)
        return
    assert UNCHECKED not in node, "a type with unknown fields takes anything in them"
    assert kind in ("object", "array", "string", "integer", "number", "boolean")
    if kind == "string":
        assert "maxLength" in node or "enum" in node
    if kind == "array":
        assert {"maxItems", "items"} <= node.keys()
    if kind == "integer":
        assert {"minimum", "maximum"} <= node.keys()
    if kind == "object" and "properties" not in node:
        assert "maxProperties" in node
        # Of values without a type CEL sees nothing, their keys included; the models bound those.
        assert UNCHECKED in node["additionalProperties"] or _bounds_keys(node)


def _bounds_keys(node: Node) -> bool:
    return any("size(key) <= " in rule["rule"] for rule in node.get("x-kubernetes-validations", []))


def _without_a_type(node: Node) -> None:
    """Each kind of value that it may hold is bounded or refused."""
    assert "maxLength" in node
    if node.get("x-kubernetes-int-or-string"):
        assert {"minimum", "maximum"} <= node.keys()
        return
    assert node[UNCHECKED] is True
    assert "properties" not in node, "keys beside them would take anything"
    assert node["maxItems"] < node["minItems"] if "items" not in node else node["maxItems"] > 0
    of_maps = "additionalProperties" in node
    assert node["maxProperties"] > 0 if of_maps else node["maxProperties"] < node["minProperties"]


def _depth(node: Node) -> int:
    inner = [*node.get("properties", {}).values(), node.get("items"), node.get("additionalProperties")]
    below = [_depth(child) for child in inner if child is not None]
    return 1 + max(below, default=0) if below or node.get("type") in ("object", "array") else 0


def test_nothing_is_nested_deeply() -> None:
    assert _depth(SPEC) <= DEEPEST
    assert _depth(SCHEMA["status"]) <= DEEPEST


def test_every_single_text_fits_into_what_a_spec_may_take() -> None:
    for path, node in nodes(SPEC):
        longest = node.get("maxLength", 0)
        assert longest * 4 < 128 * 1024, _name(path)


def _takes(value: dict[str, Any]) -> bool:
    try:
        # As it is read: an empty value is an absent one.
        FineTuneJobSpec.model_validate(_dropped(value), by_alias=True, by_name=False)
    except ValidationError:
        return False
    return True


def _dropped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dropped(inner) for key, inner in value.items() if inner is not None}
    return [_dropped(inner) for inner in value] if isinstance(value, list) else value


CASES = {
    key: [
        ((key, *path), word, value)
        for path, node in nodes(SPEC["properties"][key])
        # What a format must contain is beyond a schema; CEL says it, and `test_prompt_format_refusals.py`.
        if "prompt_format" not in path
        for word, value in (*edges(node), *beyond(node))
    ]
    for key in SPEC["properties"]
}


@pytest.mark.parametrize("key", CASES)
def test_schema_and_models_agree_at_the_edges(key: str) -> None:
    assert CASES[key]
    for path, word, value in CASES[key]:
        written = at(path, value, SPEC)
        assert _takes(written) == accepts(SPEC, written), f"{_name(path)}: {word}"


def test_there_is_something_at_both_sides_of_the_edges() -> None:
    verdicts = [accepts(SPEC, at(path, value, SPEC)) for cases in CASES.values() for path, _, value in cases[::40]]
    assert min(verdicts.count(True), verdicts.count(False)) > 10


@pytest.mark.parametrize("levels", [20, 200])
@pytest.mark.parametrize("kind", ["[]", "{}"])
def test_no_place_takes_what_is_nested_without_end(levels: int, kind: str) -> None:
    deep = nested(levels, kind)
    for path, node in nodes(SPEC):
        if path and not (node.get("type") == "object" and "properties" in node and kind == "{}"):
            assert not accepts(SPEC, at(path, deep, SPEC)), _name(path)
        assert not _takes(at(path, deep, SPEC)), _name(path)


_TYPES: dict[str, Any] = {
    "modules": Modules,
    "layers": Layers,
    "initialization": Initialization,
    "weights": WeightsSource,
    "quantity": Quantity,
    "quantities": Quantities,
    "labels": LabelMap,
    "free": FreeObject,
    "flat": FlatObject,
}
_ADAPTERS = {name: TypeAdapter(kind) for name, kind in _TYPES.items()}
_NODES = {
    name: flatten(found := adapter.json_schema(), found.get("$defs", {}), ()) for name, adapter in _ADAPTERS.items()
}

_SCALARS = (
    st.booleans()
    | st.integers(-2, 3)
    | st.integers(2**53 - 1, 2**53 + 1)
    | st.floats(allow_nan=False, allow_infinity=False, width=16).filter(lambda number: not number.is_integer())
    | st.sampled_from(["", "a", "1", "500m", "1.5Gi", "-1", "\x00", "\u202e", "a\n", "x" * 256, "x" * 257, "x" * 4097])
)
_KEYS = st.sampled_from(["repo_id", "revision", "a", "", "k" * 256, "k" * 317, "k" * 318])
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=8
)


@pytest.mark.parametrize("name", _TYPES)
@given(value=_VALUES)
def test_schema_and_models_agree_on_values_of_more_than_one_type(name: str, value: Any) -> None:
    try:
        _ADAPTERS[name].validate_python(as_stored(value), strict=True)
        taken = True
    except ValidationError:
        taken = False
    free = name in ("free", "flat")
    if free and _longest_key(value) > 256:
        assert not taken  # by the models alone: no schema and no rule sees these keys
        return
    assert taken == accepts(_NODES[name], value)


def _longest_key(value: Any) -> int:
    if isinstance(value, dict):
        return max((max(len(key), _longest_key(inner)) for key, inner in value.items()), default=0)
    return max(map(_longest_key, value), default=0) if isinstance(value, list) else 0


@pytest.mark.parametrize(("levels", "fits"), [(FREE_LEVELS - 1, True), (FREE_LEVELS, False)])
def test_a_free_object_goes_as_deep_as_an_inline_configuration_of_deepspeed(levels: int, *, fits: bool) -> None:
    inline = {"zero_optimization": {"stage": 3}, "optimizer": {"params": {"betas": [0.9, 0.95]}}}
    assert _takes(spec(deepspeed=inline))
    assert accepts(SPEC, spec(deepspeed=inline))
    deep = {"a": nested(levels - 1)}
    assert _takes(spec(deepspeed=deep)) is fits
    assert accepts(SPEC, spec(deepspeed=deep)) is fits
