"""Values of more than one type and objects whose keys are somebody else's, bounded in the schema as in the models.

A structural schema has neither unions nor free objects: there is only `x-kubernetes-preserve-unknown-fields`, which by
itself takes JSON of any depth, and a value nested a thousand deep breaks the parser of everybody who lists the kind. So
every such node says what may stand in it. Bounds of one kind of value that contradict each other refuse that kind.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema, WrapValidator
from pydantic_core import PydanticCustomError

UNTYPED: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}
INT_OR_TEXT: dict[str, Any] = {"x-kubernetes-int-or-string": True}

NO_TEXT = {"minLength": 1, "maxLength": 0}
NO_NUMBER = {"minimum": 1, "maximum": 0}
NO_LIST = {"minItems": 1, "maxItems": 0}
NO_OBJECT = {"minProperties": 1, "maxProperties": 0}
NO_BOOLEAN = {"not": {"enum": [True, False]}}

FREE_LEVELS = 4
"""Lists and objects within each other in a free object, itself included: as many as DeepSpeed's own file has."""
FREE_ENTRIES = 256
FREE_TEXT = 4096
FREE_KEY = 256
"""In characters. No schema bounds the keys of an object whose values have no type; the models do."""


def one_of_several(what: str) -> WrapValidator:
    """A validator for a union: its one error says what all the branches together take."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError as error:
            raise PydanticCustomError("one_of_several", "must be {what}", {"what": what}) from error

    return WrapValidator(check)


def _node(levels: int) -> dict[str, Any]:
    """The schema of a value with at most `levels` lists and objects within each other."""
    scalar = {**UNTYPED, "maxLength": FREE_TEXT}
    if levels == 0:
        return {**scalar, **NO_LIST, **NO_OBJECT}
    inner = _node(levels - 1)
    return {
        **scalar,
        "maxItems": FREE_ENTRIES,
        "items": inner,
        "maxProperties": FREE_ENTRIES,
        "additionalProperties": inner,
    }


def _object(levels: int) -> dict[str, Any]:
    return {"type": "object", "maxProperties": FREE_ENTRIES, "additionalProperties": _node(levels - 1)}


def _fault(value: Any, levels: int) -> str | None:
    """What is wrong with a value of at most `levels` lists and objects within each other; the rest of a sentence."""
    if isinstance(value, str):
        if len(value) > FREE_TEXT:
            return f"must not hold a text of more than {FREE_TEXT} characters"
        return None if value.isascii() or _is_unicode(value) else "must hold text of valid Unicode characters"
    if isinstance(value, (dict, list)):
        if levels == 0:
            return "must not be nested so deeply: leave out its innermost lists and mappings"
        if len(value) > FREE_ENTRIES:
            return f"must not hold a list or mapping of more than {FREE_ENTRIES} entries"
        if isinstance(value, list):
            return next((fault for item in value if (fault := _fault(item, levels - 1))), None)
        for key, inner in value.items():
            if not isinstance(key, str) or len(key) > FREE_KEY or not (key.isascii() or _is_unicode(key)):
                return f"must have keys of at most {FREE_KEY} characters"
            if fault := _fault(inner, levels - 1):
                return fault
        return None
    if isinstance(value, float) and not abs(value) < float("inf"):
        return "must hold finite numbers"
    return None if value is None or isinstance(value, (bool, int, float)) else "must hold plain values"


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(levels: int) -> AfterValidator:
    def check(value: dict[str, Any]) -> dict[str, Any]:
        if fault := _fault(value, levels):
            raise PydanticCustomError("free_object", "{fault}", {"fault": fault})
        return value

    return AfterValidator(check)


FreeObject = Annotated[dict[str, Any], _checked(FREE_LEVELS), WithJsonSchema(_object(FREE_LEVELS))]
"""An object whose keys belong to somebody else, with objects and lists in it."""

FlatObject = Annotated[dict[str, Any], _checked(1), WithJsonSchema(_object(1))]
"""An object whose keys belong to somebody else, of single values."""
