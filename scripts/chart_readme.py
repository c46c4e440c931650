"""Prints the Helm chart's README with the table of its values, which is read from values.yaml as helm-docs reads it.

A comment that begins with `# --` describes the key below it, and everything inside of that key. The text around the
table is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "finetune-operator"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"

_KEY = re.compile(r"^( *)([\w.-]+):")
_COMMENT = re.compile(r"^ *# ?(.*)$")
_TYPES = {dict: "object", list: "list", str: "string", bool: "bool", int: "int", float: "float"}


class Value(NamedTuple):
    """A key of values.yaml that has a description."""

    path: tuple[str, ...]
    default: Any
    description: str


def documented(text: str) -> Iterator[Value]:
    """The described keys of a values.yaml, in its order."""
    values = yaml.safe_load(text)
    path: list[str] = []
    description: list[str] = []
    for line in text.splitlines():
        if comment := _COMMENT.match(line):
            words = comment.group(1)
            description = (
                [words.removeprefix("-- ")]
                if words.startswith("-- ")
                else description
                and [
                    *description,
                    words,
                ]
            )
        elif key := _KEY.match(line):
            path = [*path[: len(key.group(1)) // 2], key.group(2)]
            if description:
                yield Value(tuple(path), _at(values, path), " ".join(description))
            description = []
        else:
            description = []


def undocumented(text: str) -> list[str]:
    """Keys without a description of their own or of what they are in."""
    known = {value.path for value in documented(text)}

    def leaves(node: Any, path: tuple[str, ...]) -> Iterator[str]:
        if path in known:
            return
        if isinstance(node, dict) and node:
            for key, inner in node.items():
                yield from leaves(inner, (*path, key))
        else:
            yield ".".join(path)

    return list(leaves(yaml.safe_load(text), ()))


def readme() -> str:
    """The README as it has to be.

    Raises:
        ValueError: it has no place for the table.
    """
    text = (CHART / "README.md").read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{CHART / 'README.md'} has no lines {BEGIN.strip()} and {END.strip()}.")
    return before + begin + "\n" + _table(documented((CHART / "values.yaml").read_text())) + "\n" + end + after


def _table(values: Iterator[Value]) -> str:
    lines = ["| Key | Type | Default | Description |", "| --- | --- | --- | --- |"]
    for path, default, description in values:
        shown = json.dumps(default, ensure_ascii=False)
        lines.append(f"| `{'.'.join(path)}` | {_TYPES[type(default)]} | `{shown}` | {_cell(description)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _at(values: Any, path: list[str]) -> Any:
    for key in path:
        values = values[key]
    return values


if __name__ == "__main__":
    sys.stdout.write(readme())
