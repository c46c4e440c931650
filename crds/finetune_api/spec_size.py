"""How large a spec may be: measured before anything else is done with it, since all else costs more.

Each field has bounds of its own, which leave room for what real jobs have; a spec that goes to all of them at once is
no job. Whoever reads specs of others, as the operator does, has to be through with each in milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

SPEC_LIMIT_BYTES = 128 * 1024
"""Of a spec as JSON without spaces, in UTF-8."""

SPEC_LIMIT_VALUES = 10_000
"""Texts, numbers, lists and mappings in a spec together: `[]` takes two bytes, and as long to read as any other."""

_TOKENS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{,]', re.DOTALL)
"""Texts, and what stands before a value. A text that does not end is one up to the end: nothing is looked at twice."""

_TOKENS_OF_A_VALUE = 3
"""At most: what stands before it, its key, and itself where it is a text."""


def size_fault(spec: Any) -> str | None:
    """The end of a sentence about a spec that is too large to be read; None when it is not."""
    try:
        size_bytes = _size_bytes(spec)
    except RecursionError:
        return "is nested too deeply to be a job's: take out the innermost lists and mappings."
    if size_bytes > SPEC_LIMIT_BYTES:
        most = _kib(SPEC_LIMIT_BYTES)
        return (
            f"takes {_kib(size_bytes)} KiB as JSON{_largest(spec)}, and {most} KiB is the most that is read: shorten "
            "its texts and lists; what is data belongs into a file that the spec names."
        )
    if has_more_values(spec, SPEC_LIMIT_VALUES):
        return f"holds more than {SPEC_LIMIT_VALUES} values, which is the most that is read: shorten its lists."
    return None


def _size_bytes(value: Any) -> int:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError):
        return 0  # no JSON; the models say at which place
    return len(text.encode("utf-8", "surrogatepass"))


def has_more_values(value: Any, limit: int) -> bool:
    """Whether there are more than `limit` values in `value`; looks at no more than that."""
    count, waiting = 0, [value] if isinstance(value, dict | list) else []
    while waiting and count <= limit:
        held = waiting.pop()
        inner: Iterable[Any] = held.values() if isinstance(held, dict) else held
        count += len(held)
        if count <= limit:
            waiting.extend(item for item in inner if isinstance(item, dict | list))
    return count > limit


def may_have_more_values(text: str, limit: int) -> bool:
    """Whether the JSON `text` is so long that it may hold more than `limit` values; False means that it does not.

    Told without a reader, which makes an object of each value before anybody can count them.
    """
    return next(islice(_TOKENS.finditer(text), limit * _TOKENS_OF_A_VALUE, None), None) is not None


def _largest(spec: Any) -> str:
    """Which key takes most, in brackets."""
    if not isinstance(spec, Mapping) or not spec:
        return ""
    size_bytes, key = max((_size_bytes(value), str(key)) for key, value in spec.items())
    return f" ({key} alone {_kib(size_bytes)})"


def _kib(size_bytes: int) -> int:
    return -(-size_bytes // 1024)
