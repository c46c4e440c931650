"""One line of a data file -> a conversation, or the sentence that says why not.

Rows are hostile input: every shape that is not exactly what the guide describes is named, with its line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from finetune_api.prompt_format import Message

ROLES = ("system", "user", "assistant")

_SHOWN_CHARACTERS = 60
"""How much of a row's own text a sentence repeats."""

_LIST = "is a JSON list: write one object per line, not one list for the whole file."


class RowError(ValueError):
    """A row that cannot be trained on; the text is one sentence without the line number."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row."""

    messages: tuple[Message, ...]
    unused_keys: tuple[str, ...] = field(default=())
    """Keys of the row or of its messages that have no meaning here (`name`, `weight`, ...), for a notice."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """What a row must have, beyond its shape."""

    needs_answer: bool
    """At least one user and one assistant message: true unless every token is trained on."""
    strip_whitespace: bool
    """Whether white space alone counts as empty, since the prompt format removes it."""


def parse_row(line: bytes, rules: RowRules) -> Conversation:
    """The conversation in one line of JSON.

    Raises:
        RowError: the line is not JSON or not a conversation as the guide describes it.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if line.lstrip().startswith(b"["):
            raise RowError(_LIST) from None
        raise RowError(f"is not JSON ({error.msg} at column {error.colno}).") from None
    if isinstance(row, list):
        raise RowError(_LIST)
    if not isinstance(row, dict):
        raise RowError('is not a JSON object with "messages".')
    if "messages" not in row:
        raise RowError(f'has no "messages" (it has {_names(row)}).')
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise RowError('"messages" must be a list with at least one user and one assistant message.')
    parsed = tuple([_message(number, message, rules) for number, message in enumerate(messages, 1)])
    _check_roles([message.role for message in parsed], rules)
    # Keys that mean something are all there by now.
    if len(row) == 1 and max(map(len, messages)) == 2:
        return Conversation(parsed)
    unused = [key for key in row if key != "messages"]
    unused += [f"messages[].{key}" for message in messages for key in message if key not in ("role", "content")]
    return Conversation(parsed, tuple(dict.fromkeys(map(_cut, unused))))


def _message(number: int, message: Any, rules: RowRules) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is not an object with role and content.")
    role = message.get("role")
    if role not in ROLES:
        known = "has no role" if role is None else f"has the unknown role {_cut(repr(role))}"
        raise RowError(f"message {number} {known}: roles are system, user and assistant.")
    if "content" not in message:
        raise RowError(f"message {number} ({role}) has no content.")
    content = message["content"]
    if not isinstance(content, str):
        raise RowError(f"message {number} ({role}) has a content that is {_kind(content)}: write it as one string.")
    if not content or (rules.strip_whitespace and not content.strip()):
        raise RowError(f"message {number} ({role}) has an empty content.")
    return Message(role, content)


def _check_roles(roles: list[str], rules: RowRules) -> None:
    if roles.count("system") > 1:
        raise RowError("has more than one system message.")
    if rules.needs_answer:
        for role in ("user", "assistant"):
            if role not in roles:
                raise RowError(f"has no {role} message.")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(f'"{_cut(key)}"' for key in list(row)[:5]) or "no keys"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case _:
            return "an object"
