"""Pydantic's findings about a spec, as sentences that say what to write instead."""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune_api.foreign_keys import FOREIGN_KEYS
from finetune_api.job import FineTuneJob
from finetune_api.llmforge import REFUSED_PEFT_KEYS
from finetune_api.problem import Problem
from finetune_api.prompt_format import HuggingFaceChatTemplate, PromptFormat

LOOKED_AT = 1000
"""Findings that are put in order; of more, those that pydantic names first."""

_COMPARED = 64
"""Characters of a key or a word that are compared with those that could be meant, which are shorter."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What pydantic found at one place; the sentence is made when it is asked for, since it takes a search."""

    path: str
    """As a problem's."""
    place: tuple[int, ...]
    """By which findings are in the order of the document."""
    _detail: ErrorDetails
    _where: Sequence[str | int]
    _known: Sequence[str]

    def problem(self) -> Problem:
        """The finding as a sentence."""
        return Problem(self.path, _sentence(self._detail, self._where, self._known))


def findings_of(error: ValidationError, document: Mapping[str, Any]) -> tuple[list[Finding], int]:
    """One finding per place, in the order of the document, and how many more there are that were not looked at.

    Paths start at the top of the manifest.
    """
    found: dict[str, Finding] = {}
    orders: dict[int, dict[str, int]] = {}
    details = error.errors(include_url=False)
    for detail in details[:LOOKED_AT]:
        where, known = _locate(detail["loc"])
        path = dotted(where)
        if path not in found:
            found[path] = Finding(path, _place(document, where, orders), detail, where, known)
    return sorted(found.values(), key=lambda finding: finding.place), len(details[LOOKED_AT:])


def dotted(keys: Sequence[str | int]) -> str:
    """`spec.workers.env[2].name` for its keys."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def _place(value: Any, where: Sequence[str | int], orders: dict[int, dict[str, int]]) -> tuple[int, ...]:
    """Where in the document a value stands; what is not there comes first.

    Args:
        value: the document.
        where: keys from its top.
        orders: the order of keys of mappings already looked at, by their ids.
    """
    place: list[int] = []
    for key in where:
        if isinstance(value, Mapping) and key in value:
            order = orders.get(id(value))
            if order is None:
                order = orders[id(value)] = {name: number for number, name in enumerate(value)}
            place.append(order[str(key)])
            value = value[str(key)]
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            place.append(key)
            value = value[key]
        else:
            return (-1,)
    return tuple(place)


def _locate(location: Sequence[str | int]) -> tuple[list[str | int], Sequence[str]]:
    """The keys of `location` as the user wrote them, and the keys known beside the last one."""
    where: list[str | int] = []
    here: tuple[type[BaseModel], ...] = (FineTuneJob,)
    known: Sequence[str] = ()
    for key in location:
        fields = _fields(here)
        known = tuple(fields)
        if key in fields:
            where.append(key)
            here = tuple(_models(fields[str(key)]))
        elif isinstance(key, int) or not _is_branch(here, key):
            where.append(key)
            here = here if isinstance(key, int) else ()
    return where, known


def _is_branch(here: Sequence[type[BaseModel]], key: str) -> bool:
    """Whether `key` is pydantic's own name for a union's branch, which no user wrote."""
    if key in ("declared", "tokenizers_own"):
        return PromptFormat in here or HuggingFaceChatTemplate in here
    return key == "[key]"


@functools.cache
def _fields(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for model in models for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for inner in typing.get_args(annotation):
        yield from _models(inner)


@functools.cache
def _homes() -> dict[str, str]:
    """Where keys belong, for those that stand elsewhere: name to dotted parent, the outermost first."""
    found: dict[str, str] = {}
    level: list[tuple[tuple[str, ...], type[BaseModel]]] = [((), FineTuneJob)]
    while level:
        below: list[tuple[tuple[str, ...], type[BaseModel]]] = []
        for path, model in level:
            for name, annotation in _fields((model,)).items():
                if name == "status":
                    continue
                found.setdefault(name, ".".join(path))
                below.extend(((*path, name), inner) for inner in _models(annotation))
        level = below
    return found


def _sentence(detail: ErrorDetails, where: Sequence[str | int], known: Sequence[str]) -> str:
    name = str(where[-1]) if where else "the job"
    value, context = detail["input"], detail.get("ctx", {})
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown(where, known)
    if kind == "literal_error":
        return _literal(name, value, str(context["expected"]))
    if kind in _WRONG_TYPE:
        return f"{name} must be {_WRONG_TYPE[kind]}{_instead(kind, value)}."
    if kind in _BOUND:
        return f"{name} must be {_BOUND[kind].format(**context)}{_shown(value)}."
    if kind in ("string_too_short", "too_short"):
        return f"{name} must not be empty: give a value or remove the key."
    match kind:
        case "missing":
            return f"{name} is required."
        case "string_pattern_mismatch":
            return f"{name} must match {context['pattern']}{_shown(value)}."
        case "string_unicode":
            return f"{name} must be text of valid Unicode characters: correct what stands there."
        case "one_of_several":
            return f"{name} {detail['msg']}{_instead(kind, value)}."
        case "free_object":
            return f"{name} {detail['msg']}."
        case "value_error":
            return str(context["error"])
        case _:
            return f"{name}: {detail['msg']}."


_WRONG_TYPE = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}

_BOUND = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "string_too_long": "at most {max_length} characters long",
    "too_long": "at most {max_length} entries long",
}


def _instead(kind: str, value: Any) -> str:
    """What was written, and what to change about it."""
    if isinstance(value, str):
        if kind in ("int_type", "float_type") and _is_number(value):
            return f': remove the quotes around "{value}"'
        if kind == "bool_type" and value.lower() in ("true", "false", "yes", "no", "on", "off"):
            return f': remove the quotes around "{value}"'
        if kind == "list_type":
            return ": write it as [value]"
        return ", not text"
    if isinstance(value, bool):
        shown = str(value).lower()
        return f': put quotes around it ("{shown}")' if kind == "string_type" else f", not {shown}"
    if isinstance(value, (int, float)):
        return f': put quotes around it ("{_digits(value)}")' if kind == "string_type" else f", not {_digits(value)}"
    if isinstance(value, list):
        return ", not a list"
    if isinstance(value, Mapping):
        return ", not a mapping of keys"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    """The value where it is short and cannot be a secret."""
    return f", not {_digits(value)}" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _digits(number: float) -> str:
    try:
        return str(number)
    except ValueError:  # Python writes no whole number of more than 4 300 digits.
        return "a number of thousands of digits"


def _literal(name: str, value: Any, expected: str) -> str:
    choices = expected.replace("'", "")
    if not isinstance(value, str):
        return f"{name} must be {choices}{_instead('literal', value)}."
    options = choices.replace(" or ", ", ").split(", ")
    near = difflib.get_close_matches(value[:_COMPARED], options, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]}?" if near and len(options) > 1 else "."
    return f"{name} must be {choices}, not {value[:64]!r}{hint}"


def _unknown(where: Sequence[str | int], known: Sequence[str]) -> str:
    name = str(where[-1])
    if name in known:
        return f"{name} has no meaning beside use_hugging_face_chat_template: remove one of the two."
    if "lora_alpha" in known and name in REFUSED_PEFT_KEYS:
        return f"{name} of PEFT's LoraConfig is not supported ({REFUSED_PEFT_KEYS[name]}): remove it."
    if len(where) == len(("spec", name)) and name in FOREIGN_KEYS:
        return f"{name} is not a known key: {FOREIGN_KEYS[name]}."
    like = name[:_COMPARED]
    near = difflib.get_close_matches(like, known, n=1, cutoff=0.7) or _ignoring_spelling(like, known)
    if near:
        return f"{name} is not a known key: did you mean {near[0]}?"
    home = _homes().get(name)
    if home:
        return f"{name} is not a known key here: it belongs under {home.removeprefix('spec.')}; check the indentation."
    near = difflib.get_close_matches(like, known, n=1, cutoff=0.3)
    hint = f"; the nearest known one is {near[0]}" if near else f"; known here: {', '.join(sorted(known)[:12])}"
    return f"{name} is not a known key{hint}."


def _ignoring_spelling(name: str, known: Sequence[str]) -> list[str]:
    """`gpus_per_node` for gpusPerNode."""
    return [key for key in known if key.replace("_", "").lower() == name.replace("_", "").replace("-", "").lower()]
