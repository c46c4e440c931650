"""YAML or JSON text to plain data, read the way kubectl reads it.

PyYAML alone takes 1e-4 for text, 1:30 for 90 and a date for a timestamp, keeps the last of two equal keys in silence,
and lets a few hundred bytes of aliases grow to gigabytes. None of that may decide what is trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

SIZE_LIMIT_BYTES = 1024 * 1024
"""Largest file that is read; the API server stores none of 1.5 MiB."""

_NODE_LIMIT = 100_000
"""Most values in a document once its aliases are written out."""

_DEPTH_LIMIT = 100


class DocumentError(ValueError):
    """A text that holds no document; the message is a sentence for the user."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with kubectl's idea of scalars, without repeated keys, and with an end to its patience."""

    bool_values: ClassVar[dict[str, bool]] = {**yaml.SafeLoader.bool_values, "y": True, "n": False}

    def __init__(self, text: str, patience: float = math.inf) -> None:
        self._patience = patience
        super().__init__(text)

    def fetch_more_tokens(self) -> None:
        # For each token PyYAML looks at every bracket that is open: a few KiB of them would take a second.
        self._patience -= 1 + self.flow_level
        if self._patience < 0:
            raise yaml.MarkedYAMLError(None, None, "there is more than is read of YAML here", self.get_mark())
        if self.flow_level > _DEPTH_LIMIT:
            raise RecursionError
        super().fetch_more_tokens()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a single text", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in seen:
                problem = f"the key {key.value!r} was already given on line {seen[key.value]}"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            seen[key.value] = line
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: ARG002  # PyYAML's signature
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


_Loader.yaml_implicit_resolvers = {}


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolve(
    "bool", r"^(?:y|Y|n|N|yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"
)
_resolve("int", r"^[-+]?(?:0b[0-1_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$", "-+0123456789")
_resolve("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+0123456789.")
_resolve("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.")
_resolve("merge", r"^<<$", "<")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])


def _construct_map(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    return loader.construct_mapping(node)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    value = loader.construct_yaml_float(node)
    if not math.isfinite(value):
        raise yaml.MarkedYAMLError(None, None, f"{node.value} is no finite number", node.start_mark)
    return value


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)
    return _checked(value)


def _checked(value: int) -> int:
    """A whole number that is no larger than any other number: Go reads no JSON with one, Python may not print it."""
    if abs(value) >= 2**1024:
        raise ValueError("a whole number is too large for any key")
    return value


def _refuse_tag(_: _Loader, node: yaml.Node) -> Any:
    raise yaml.MarkedYAMLError(None, None, f"the tag {node.tag} has no meaning here", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor(None, _refuse_tag)
for _tag in ("binary", "timestamp", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refuse_tag)


def is_other_than_text(value: str) -> bool:
    """Whether `value` without quotes would be read as something else than text."""
    resolvers = _Loader.yaml_implicit_resolvers
    candidates = [*resolvers.get(value[:1], ()), *resolvers.get(None, ())]
    return any(pattern.match(value) for _, pattern in candidates)


def decode(data: bytes, source: str) -> str:
    """The text of a file.

    Raises:
        DocumentError: too large, or not UTF-8.
    """
    if len(data) > SIZE_LIMIT_BYTES:
        raise DocumentError(f"{source} is larger than 1 MiB, so it is no job: is it the data?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DocumentError(f"{source} is not UTF-8 text (line {line}): save it as UTF-8.") from error


def parse_mapping(text: str, source: str, patience: float = math.inf) -> dict[str, Any]:
    """The one mapping that `text` holds.

    Args:
        text: YAML or JSON.
        source: names it in messages.
        patience: how many tokens of YAML are read, of which those within brackets count more, and how many values are
            made of them.

    Raises:
        DocumentError: neither YAML nor JSON, a repeated key, no or several documents, not a mapping, or too much YAML.
    """
    if len(text.encode("utf-8", "surrogatepass")) > SIZE_LIMIT_BYTES:
        raise DocumentError(f"{source} is larger than 1 MiB, so it is no job: is it the data?")
    value = _parse(text, source, patience)
    if isinstance(value, dict):
        return value
    if value is None:
        raise DocumentError(f"{source} is empty: write at least model_id and train_path.")
    what = "a list" if isinstance(value, list) else "a single value"
    raise DocumentError(f"{source} holds {what}, not a mapping of keys such as model_id and train_path.")


def parse_value(text: str, source: str) -> Any:
    """The value that `text` is in YAML.

    Raises:
        DocumentError: it is not YAML.
    """
    return _yaml(text, source)


def _parse(text: str, source: str, patience: float) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(
                text,
                object_pairs_hook=_unique,
                parse_constant=_no_constant,
                parse_float=_finite,
                parse_int=lambda digits: _checked(int(digits)),
            )
        except json.JSONDecodeError as error:
            if source.endswith(".json"):
                raise DocumentError(
                    f"{source} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
                ) from error
        except RecursionError as error:
            raise DocumentError(f"{source} is nested too deeply to be a job.") from error
        except ValueError as error:
            raise DocumentError(f"{source} is not a job: {error}.") from error
    return _yaml(text, source, patience)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no finite number")


def _yaml(text: str, source: str, patience: float = math.inf) -> Any:
    loader: _Loader | None = None
    try:
        loader = _Loader(text, patience)
        node = _only_node(loader, source)
        if node is None:
            return None
        _check_size(node, source, min(_NODE_LIMIT, patience))
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise DocumentError(_sentence(error, source)) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise DocumentError(f"{source} is not YAML: line {line} holds a control character.") from error
    except RecursionError as error:
        raise DocumentError(f"{source} is nested too deeply to be a job.") from error
    except DocumentError:
        raise
    except (ValueError, KeyError, IndexError) as error:
        # What PyYAML's constructors raise for "0x", "!!bool maybe", or a number of more than 4 300 digits.
        raise DocumentError(f"{source} holds a number or a tagged value that cannot be read.") from error
    finally:
        if loader is not None:
            loader.dispose()


def _only_node(loader: _Loader, source: str) -> yaml.Node | None:
    """The one document's root; None when there is nothing but empty documents."""
    nodes = []
    while loader.check_node():
        node = loader.get_node()
        is_empty = isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null") and not node.value
        if node is not None and not is_empty:
            nodes.append(node)
    if len(nodes) > 1:
        raise DocumentError(f"{source} holds {len(nodes)} documents: put each job into a file of its own.")
    return nodes[0] if nodes else None


def _sentence(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = error.problem or error.context or "it cannot be read"
    hint = " (indent with spaces, not tabs)" if "'\\t'" in problem else ""
    return f"{source} is not YAML that can be read: {where}{problem}{hint}."


def _check_size(root: yaml.Node, source: str, limit: float) -> None:
    """Refuse a document that its aliases make huge or endless, before it is built."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > _DEPTH_LIMIT:
            raise DocumentError(f"{source} is nested too deeply to be a job.")
        if isinstance(node, yaml.ScalarNode):
            return 1
        known = sizes.get(id(node), 0)
        if known is None:
            raise DocumentError(f"{source} contains an alias (*) to a value that it is part of.")
        if known:
            return known
        sizes[id(node)] = None
        children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
        total = 1 + sum(size(child, depth + 1) for child in children)
        if total > limit:
            raise DocumentError(f"{source} has more than {limit} values once its aliases (*) are written out.")
        sizes[id(node)] = total
        return total

    size(root, 0)
