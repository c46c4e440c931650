"""Label and field selectors, as far as the operator uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_operator.wire import Raw


def selects(labels: str = "", fields: str = "") -> Callable[[Raw], bool]:
    """Whether an object is selected by a label selector (`a`, `!a`, `a=b`, `a!=b`) and a field selector."""
    terms = [_term(text, _label) for text in labels.split(",") if text]
    terms += [_term(text, _field) for text in fields.split(",") if text]
    return lambda raw: all(term(raw) for term in terms)


def _term(text: str, value: Callable[[Raw, str], str | None]) -> Callable[[Raw], bool]:
    if "!=" in text:
        key, wanted = text.split("!=")
        return lambda raw: value(raw, key) != wanted
    if "=" in text:
        key, wanted = text.split("=")
        return lambda raw: value(raw, key) == wanted
    if text.startswith("!"):
        return lambda raw: value(raw, text[1:]) is None
    return lambda raw: value(raw, text) is not None


def _label(raw: Raw, key: str) -> str | None:
    found: str | None = (raw["metadata"].get("labels") or {}).get(key)
    return found


def _field(raw: Raw, path: str) -> str | None:
    found: Any = raw
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return str(found or "")
