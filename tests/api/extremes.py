"""What a structural schema allows at its edges: the longest, deepest, widest, strangest values of each of its nodes.

Generated from the schema, so that a field that is added tomorrow is tried tomorrow. A value is told by a word, as in
("deepest", …); whether rules of our own refuse it is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Node = Mapping[str, Any]
Path = tuple[str, ...]

INSTRUCTION = "{instruction}"
LARGEST_TEXT = 200_000
"""Characters of all texts in a value together, about; what is wider is filled with less."""

_FILLINGS = {
    "plain": "a",
    "astral": "\U0001f600",
    "right-to-left": "\u202e",
    "combining": "\u0301",
    "nul": "\x00",
    "delete": "\x7f",
    "line breaks": "\n",
    "separators": "\u2028",
    "no characters": "\uffff",
    "braces": "{",
    "quotes": '"',
    "backslashes": "\\",
    "spaces": " ",
    "dashes": "- ",
    "colons": ": ",
    "tags": "<a>",
    "dots": "../",
    "variables": "$(A)",
}
"""What texts are filled with, by a word for it."""

_BEGINNINGS = ("", "/", "A", "a", "1", "s3://b/")
_EXAMPLES = ("a", "/a", "1", "A", INSTRUCTION, "2026-01-01T00:00:00Z", "a" * 64)


def nodes(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every node below and with `node`; "[]" stands for the entries of a list, "{}" for those of a map."""
    yield path, node
    for key, inner in node.get("properties", {}).items():
        yield from nodes(inner, (*path, key))
    if "items" in node:
        yield from nodes(node["items"], (*path, "[]"))
    if "additionalProperties" in node:
        yield from nodes(node["additionalProperties"], (*path, "{}"))


def least(node: Node) -> Any:
    """The smallest value that a node takes."""
    if "enum" in node:
        return node["enum"][0]
    match node.get("type"):
        case "object":
            return {key: least(node["properties"][key]) for key in node.get("required", [])}
        case "array":
            return [least(node["items"]) for _ in range(node.get("minItems", 0))]
        case "string":
            return next(text for text in _EXAMPLES if _takes_text(node, text))
        case "integer" | "number":
            return max(1, node.get("minimum", 1))
        case "boolean":
            return False
    return "1" if _takes_text(node, "1") else 1


def at(path: Path, value: Any, node: Node) -> Any:
    """The smallest value of `node` that has `value` at a path."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if key == "[]":
        return [at(rest, value, node["items"])]
    if key == "{}":
        return {_a_key(node): at(rest, value, node["additionalProperties"])}
    whole = least(node)
    return {**whole, key: at(rest, value, node["properties"][key])}


def _a_key(node: Node) -> str:
    """A key that a map may have alone."""
    return str(node["anyOf"][0]["required"][0]) if "anyOf" in node else "a"


def edges(node: Node) -> Iterator[tuple[str, Any]]:
    """Values at the edge of what a node takes, each with a word for it."""
    kind = node.get("type")
    if "enum" in node:
        yield from ((f"choice {choice}", choice) for choice in node["enum"])
        return
    if kind in ("string", None):
        yield from _texts(node)
    if kind in ("integer", "number", None) and not _refuses(node, "minimum", "maximum"):
        yield from _numbers(node)
    if kind == "boolean" or (kind is None and "maxItems" in node and _takes(node, True)):
        yield from (("true", True), ("false", False))
    if kind == "array" or "items" in node:
        yield from _lists(node)
    if kind == "object" or "additionalProperties" in node:
        yield from _maps(node)


def beyond(node: Node) -> Iterator[tuple[str, Any]]:
    """Values just beyond what a node takes."""
    kind = node.get("type")
    if kind == "string" and "enum" not in node:
        yield "too long", "a" * (node["maxLength"] + 1)
    if kind == "array":
        yield "too many", [least(node["items"])] * (node["maxItems"] + 1)
    if kind == "object" and "maxProperties" in node:
        values = least(node["additionalProperties"])
        yield "too many", {f"k{number}": values for number in range(node["maxProperties"] + 1)}
        if "x-kubernetes-validations" in node:
            yield "a long key", {"k" * 1000: values}
    if kind in ("integer", "number") and "maximum" in node:
        yield "too large", node["maximum"] + 1
        yield "too small", node["minimum"] - 1
    if kind is None:
        yield "nested without end", nested(50)
        yield "maps without end", nested(50, "{}")
        yield "too long", "a" * 70_000
    if kind != "object":
        yield "another type", {"a": {"b": {"c": {"d": {"e": 1}}}}}


def nested(levels: int, kind: str = "[]") -> Any:
    """Lists or maps within each other."""
    value: Any = []
    for _ in range(levels):
        value = [value] if kind == "[]" else {"a": value}
    return value


def _takes_text(node: Node, text: str) -> bool:
    fits = node.get("minLength", 0) <= len(text) <= node.get("maxLength", len(text))
    # As Go reads a pattern: `$` is the end of the text, not a line break before it.
    pattern = node.get("pattern", "").replace("$", r"\Z")
    return fits and re.search(pattern, text) is not None


def _texts(node: Node) -> Iterator[tuple[str, str]]:
    longest = min(node.get("maxLength", 0), LARGEST_TEXT)
    if _takes_text(node, ""):
        yield "empty text", ""
    for word, filling in _FILLINGS.items():
        made = (_filled(beginning, filling, longest) for beginning in _BEGINNINGS)
        text = next((text for text in made if _takes_text(node, text)), None)
        if text is not None:
            yield f"{longest} {word}", text
    if longest > 10_000:
        yield "a format", _filled(INSTRUCTION, "<a> ", longest)
        yield "a format with spaces", _filled(INSTRUCTION + "a", " ", longest - 1) + "b"


def _filled(beginning: str, filling: str, length: int) -> str:
    return (beginning + filling * length)[:length]


def _numbers(node: Node) -> Iterator[tuple[str, float]]:
    whole = node.get("type") == "integer" or "multipleOf" in node or "x-kubernetes-int-or-string" in node
    found: list[float] = [node[key] for key in ("minimum", "maximum") if key in node]
    if not whole:
        found += [0.1, 5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 2**63 - 1, -(2**63)]
    elif node.get("type") is None:
        found += [2.0]
    yield from ((f"number {number!r}", number) for number in found if _takes(node, number))


def _takes(node: Node, value: float) -> bool:
    """Whether a node takes a number or a boolean."""
    if isinstance(value, bool):
        return value not in node.get("not", {}).get("enum", [])
    above = value > node["minimum"] if node.get("exclusiveMinimum") else value >= node.get("minimum", value)
    below = value < node["maximum"] if node.get("exclusiveMaximum") else value <= node.get("maximum", value)
    return bool(above and below)


def _refuses(node: Node, lower: str, upper: str) -> bool:
    return upper in node and node.get(lower, 0) > node[upper]


def _lists(node: Node) -> Iterator[tuple[str, list[Any]]]:
    if node.get("minItems", 0) == 0:
        yield "empty list", []
    inner = node["items"]
    most = node["maxItems"]
    keys = node.get("x-kubernetes-list-map-keys")
    if keys:
        # Names of one length that all differ.
        yield f"{most} entries", [least(inner) | {keys[0]: f"a{number:03d}"} for number in range(most)]
    else:
        yield f"{most} entries", [least(inner)] * most
        if inner.get("type") == "string" and "maxLength" in inner:
            length = min(inner["maxLength"], LARGEST_TEXT // most)
            entries = [_filled(f"{number:04d}", "a", length) for number in range(most)]
            if all(_takes_text(inner, entry) for entry in entries):
                yield f"{most} long entries", entries


def _maps(node: Node) -> Iterator[tuple[str, dict[str, Any]]]:
    if not node.get("required") and "anyOf" not in node:
        yield "empty map", {}
    if "properties" in node:
        optional = node["properties"].keys() - set(node.get("required", []))
        yield "nulls everywhere", {**least(node), **dict.fromkeys(sorted(optional))}
        return
    for alternative in node.get("anyOf", []):
        yield "named keys", {key: least(node["additionalProperties"]) for key in alternative["required"]}
    if "anyOf" in node:
        return
    most, inner = node["maxProperties"], node["additionalProperties"]
    length = min(_key_limit(node), LARGEST_TEXT // most)
    yield f"{most} keys", {f"{number:04d}{'k' * (length - 4)}": least(inner) for number in range(most)}
    yield "odd keys", {key: least(inner) for key in ("", "\x00", "\u202e", "a.b", "[0]", "__proto__", "\U0001f600")}
    yield "a null", {"a": None}
    if inner.get("x-kubernetes-preserve-unknown-fields"):
        yield "deepest lists", {"a": _deepest(inner, "items")}
        yield "deepest maps", {"a": _deepest(inner, "additionalProperties")}
        yield "most values", {"a": _widest(inner)}


def _key_limit(node: Node) -> int:
    """The longest key that rule and models allow."""
    rules = [rule["rule"] for rule in node.get("x-kubernetes-validations", [])]
    found = [int(match.group(1)) for rule in rules if (match := re.search(r"size\(key\) <= (\d+)", rule))]
    return min(found, default=256)


def _deepest(node: Node, inner: str) -> Any:
    if inner not in node:
        return None if inner == "items" else "\x00"
    return [_deepest(node[inner], inner)] if inner == "items" else {"a": _deepest(node[inner], inner)}


def _widest(node: Node) -> Any:
    """As many values as take the fewest characters."""
    if "items" not in node:
        return 1
    if "items" in node["items"] and "items" in node["items"]["items"]:
        return [[[] for _ in range(128)] for _ in range(128)]
    return [[] for _ in range(node["maxItems"])] if "items" in node["items"] else [1] * node["maxItems"]
