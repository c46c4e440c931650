"""Hostile input, generated: JSON of any shape, near-misses of valid values, bytes that are damaged."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from finetune_trainer.errors import JobError
from tests.faults.fault_table import ALL_FAULTS

Place = tuple[str | int, ...]
"""Keys and indices from the top of a JSON value."""

HUGE = (0, -1, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30), 1e308, -0.0)
TEXTS = ("", " ", "\x00", "\ufeff", "\u2028", "\U0010ffff", "e\u0301", "../..", "a" * 5000, "{", "null", "[/INST]")

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(HUGE),
    st.sampled_from(TEXTS),
    st.text(max_size=20),
    st.sampled_from([[], {}, [[]], [None], [{}], {"": None}, [1, "a"], {"a": {"b": []}}]),
)
"""What stands where something else belongs."""

KEYS = st.text(max_size=8) | st.sampled_from([*TEXTS, "\x1b[31m", "a\nb", "constructor", "__class__"])

JSON = st.recursive(JUNK, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))
"""Of any shape."""


def some(cheap: int = 100, thorough: int = 20) -> Callable[..., Any]:
    """Settings of a property: `cheap` examples, the same each time; with FAULTS=all others, `thorough` times as many.

    Nothing is asked of an example's time: the machine has other things to do.
    """
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    count = cheap * thorough if ALL_FAULTS else cheap
    return settings(max_examples=count, derandomize=not ALL_FAULTS, deadline=None, suppress_health_check=checks)


def places(value: Any, before: Place = ()) -> Iterator[Place]:
    """Every place in a JSON value, the top first."""
    yield before
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in inner:
        yield from places(held, (*before, key))


@st.composite
def near_misses(draw: st.DrawFn, valid: Any, most: int = 3) -> Any:
    """`valid`, a JSON value, with one to `most` of its parts replaced, renamed, removed, doubled or wrapped."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(list(places(value))))
        if not place:
            continue
        held: Any = value
        for key in place[:-1]:
            held = held[key]
        key = place[-1]
        match draw(st.integers(0, 5 if isinstance(held, dict) else 4)):
            case 0 | 1:
                held[key] = copy.deepcopy(draw(JUNK))  # else later changes would reach what is drawn from
            case 2:
                del held[key]
            case 3:
                held[key] = [held[key]] * draw(st.integers(1, 3))
            case 4:
                held[key] = {str(key): held[key]}
            case _:
                held[draw(KEYS | st.sampled_from([str(key).upper(), f"{key} ", f"x{key}"]))] = held.pop(key)
    return value


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole`, cut off, with bytes changed, or with others in its midst."""
    data = bytearray(whole)
    match draw(st.integers(0, 3)):
        case 0:
            del data[draw(st.integers(0, len(data))) :]
        case 1:
            for _ in range(draw(st.integers(1, 8))):
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        case 2:
            at = draw(st.integers(0, len(data)))
            data[at:at] = draw(st.binary(max_size=40))
        case _:
            at = draw(st.integers(0, len(data)))
            del data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


def is_sentence(error: JobError, limit: int = 2000) -> bool:
    """Whether it can be shown to a user, wherever that is."""
    return error.message.endswith(".") and error.message.isprintable() and len(error.message) < limit


def as_json(value: Any) -> bytes:
    """One line; surrogates and numbers that are none are written as they are."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
