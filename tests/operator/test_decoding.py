"""No object can keep others from being read: what is too deep is cut, and everything beside it is as it was."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.decoding import DEPTH_LIMIT, Garbled, decoded, encoded, without_managed_fields

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def read(content: str | bytes) -> Any:
    """What `content` says."""
    return asyncio.run(decoded(content.encode() if isinstance(content, str) else content))


def deep(levels: int, kind: str) -> str:
    """JSON that is nested so deep."""
    return '{"a":' * levels + "1" + "}" * levels if kind == "object" else "[" * levels + "]" * levels


@given(JSON)
def test_what_can_be_read_is_read_as_it_is(value: Any) -> None:
    assert read(json.dumps(value)) == value


@given(beside=JSON, levels=st.integers(1025, 5000), kind=st.sampled_from(["object", "list"]), text=st.text())
def test_beside_the_deepest_object_everything_is_read(beside: Any, levels: int, kind: str, text: str) -> None:
    content = (
        f'{{"items":[{json.dumps(beside)},{{"x":{deep(levels, kind)},"y":{json.dumps(text)}}},{json.dumps(beside)}]}}'
    )
    first, cut, last = read(content)["items"]
    assert first == last == beside
    assert cut["y"] == text
    depth, value = 0, cut["x"]
    while isinstance(value, dict | list) and value:
        depth, value = depth + 1, value["a"] if isinstance(value, dict) else value[0]
    assert value is None or value == []
    assert depth <= DEPTH_LIMIT


@pytest.mark.parametrize(
    "content",
    ["", "<html>", '{"a":', "[" * 3000, "]" * 3000, '{"a":"' + "[" * 3000, "nul", '{"a" 1}', b"\xff\xfe", b"\x00"],
)
def test_what_is_no_json_is_said_to_be_none(content: str | bytes) -> None:
    with pytest.raises(Garbled):
        read(content)


def test_what_is_too_deep_to_be_written_is_said_to_be() -> None:
    value: Any = 1
    for _ in range(300):
        value = [value]
    with pytest.raises(Garbled):
        encoded(value)


@pytest.mark.parametrize("item", [{"metadata": {"name": "a", "managedFields": [1]}}, {"metadata": None}, {}, [], None])
def test_managed_fields_are_left_out_of_whatever_has_them(item: Any) -> None:
    assert "managedFields" not in json.dumps(without_managed_fields(item))
