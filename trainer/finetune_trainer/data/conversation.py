"""One line of a data file -> a conversation, or the sentence that says why not.

Rows are hostile input: every shape that is not exactly what the guide describes is named, with its line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from finetune_api.prompt_format import Message
from finetune_trainer.data.shapes import MESSAGES, ShapeError, cut, example_of, shaped

ROLES = ("system", "user", "assistant")

_SAME_ROLE = {"developer": "system", "function": "tool"}
"""OpenAI's names, one since 2024 and one before 2023."""

TOOLS, CALLS = "tools", "tool_calls"

_SHOWN_CHARACTERS = 60
"""How much of a row's own text a sentence repeats."""

_LIST = "is a JSON list: write one object per line, not one list for the whole file."

_NEED_TEMPLATE = (
    "generation_config.prompt_format cannot write: only `use_hugging_face_chat_template: true` can, where the model's "
    "chat template knows tools."
)


class RowError(ValueError):
    """A row that cannot be trained on; the text is one sentence without the line number."""

    example: str | None = None
    """How the row would have to look, where its texts can be guessed."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row."""

    messages: tuple[Message, ...]
    unused_keys: tuple[str, ...] = field(default=())
    """Keys of the row or of its messages that have no meaning here (`name`, ...), for a notice."""
    shape: str = MESSAGES
    """What the row was read as."""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Schemas of the functions that the model is told of, as the row has them."""
    text: str | None = None
    """The row is this text and no messages: it is trained on as it is."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """What a row must have, beyond its shape."""

    needs_answer: bool
    """At least one user and one assistant message: true unless every token is trained on."""
    strip_whitespace: bool
    """Whether white space alone counts as empty, since the prompt format removes it."""
    tools: bool = False
    """Whether the renderer can write tools, their calls and their results."""
    fields: tuple[str, ...] = ()
    """What else of a message the renderer is given."""
    unwritten: tuple[str, ...] = ()
    """Those of these that its template does not know."""


def parse_row(line: bytes, rules: RowRules) -> Conversation:
    """The conversation in one line of JSON.

    Raises:
        RowError: the line is not JSON or not a conversation as the guide describes it.
    """
    row = _object(line)
    if not rules.needs_answer and "text" in row and "messages" not in row:
        return _plain_text(row)
    try:
        found = shaped(row)
    except ShapeError as error:
        raise RowError(str(error)) from None
    if found is None:
        unknown = RowError(f'has no "messages" (it has {_names(row)}).')
        unknown.example = example_of(row)
        raise unknown
    messages = found.messages
    if not isinstance(messages, list) or not messages:
        raise RowError('"messages" must be a list with at least one user and one assistant message.')
    parsed = tuple([_message(number, message, rules) for number, message in enumerate(messages, 1)])
    if found.untrained and rules.needs_answer:
        numbered = enumerate(parsed, 1)
        parsed = tuple(
            [replace(m, trained=False) if n in found.untrained and m.role == "assistant" else m for n, m in numbered]
        )
    _check_roles(parsed, rules)
    # Keys that mean something are all there by now.
    if found.shape == MESSAGES and len(row) == 1 and max(map(len, messages)) == 2:
        return Conversation(parsed)
    tools = _tools(row, rules)
    used = {*found.used, *({TOOLS if row.get(TOOLS) else "functions"} if tools else ())}
    unused = [key for key in row if key not in used and not (key in (TOOLS, "functions", "system") and not row[key])]
    unused += [f"messages[].{key}" for message in messages for key in message if not _has_meaning(key, message, rules)]
    return Conversation(parsed, tuple(dict.fromkeys(map(_cut, unused))), found.shape, tools)


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if line.lstrip().startswith(b"["):
            raise RowError(_LIST) from None
        raise RowError(f"is not JSON ({error.msg} at column {error.colno}).{_encoding(line)}") from None
    if isinstance(row, list):
        raise RowError(_LIST)
    if not isinstance(row, dict):
        raise RowError('is not a JSON object with "messages".')
    return row


def _encoding(line: bytes) -> str:
    """What to do about text that is not UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return " Convert the file to UTF-8: `iconv -f WINDOWS-1252 -t UTF-8`, if it was written on Windows."
    return ""


def _plain_text(row: dict[str, Any]) -> Conversation:
    text = row["text"]
    if not isinstance(text, str) or not text:
        raise RowError('"text" must be a text that is not empty.')
    return Conversation((), tuple(_cut(key) for key in row if key != "text"), "text", text=text)


def _message(number: int, message: Any, rules: RowRules) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is not an object with role and content.")
    role = message.get("role")
    if isinstance(role, str):
        role = _SAME_ROLE.get(role, role)
        legacy = message.get("function_call")
        if legacy and not message.get(CALLS):
            message = {**message, CALLS: [{"type": "function", "function": legacy}]}
    if role not in ROLES and not (role == "tool" and rules.tools):
        if role == "tool":
            raise RowError(f"message {number} is a tool's result, which {_NEED_TEMPLATE}")
        known = "has no role" if role is None else f"has the unknown role {_cut(repr(role))}"
        raise RowError(f"message {number} {known}: roles are system, user and assistant.")
    calls = message.get(CALLS)
    if calls and not rules.tools:
        raise RowError(f"message {number} ({role}) calls tools, which {_NEED_TEMPLATE}")
    if "content" not in message and not calls and not message.get("refusal"):
        raise RowError(f"message {number} ({role}) has no content.")
    content = _content(number, role, message)
    if not calls and (not content or (rules.strip_whitespace and not content.strip())):
        raise RowError(f"message {number} ({role}) has an empty content.")
    fields = {key: message[key] for key in rules.fields if message.get(key) is not None}
    if calls:
        fields[CALLS] = _calls(number, calls)
    return Message(role, content, _is_trained(number, role, message) or not rules.needs_answer, fields)


def _content(number: int, role: str, message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        # What OpenAI's models write where they decline.
        content = message.get("refusal") or ("" if message.get(CALLS) else None)
    if isinstance(content, list) and content:
        return "".join([_part(number, role, part) for part in content])
    if not isinstance(content, str):
        raise RowError(f"message {number} ({role}) has a content that is {_kind(content)}: write it as one string.")
    return content


def _part(number: int, role: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in ("text", "refusal"):
        text = part.get(part["type"])
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else None
    shown = f"of type {_cut(repr(kind))}" if kind is not None else "that is no object with type and text"
    raise RowError(f"message {number} ({role}) has a part {shown}: only texts are trained on.")


def _is_trained(number: int, role: str, message: dict[str, Any]) -> bool:
    weight = message.get("weight")
    if role != "assistant" or weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"message {number} ({role}) has the weight {_cut(repr(weight))}: a weight is 0 or 1.")
    return bool(weight)


def _calls(number: int, calls: Any) -> list[Any]:
    """Tool calls with their arguments as an object, which is what chat templates take; OpenAI writes a JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"message {number} has {CALLS} that are no list of objects.")
    found = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"message {number} has a tool call without the name of a function.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                # Not by orjson: whole numbers stay whole, however long.
                function = {**function, "arguments": json.loads(arguments)}
            except (ValueError, RecursionError):
                raise RowError(
                    f"message {number} calls {_cut(function['name'])} with arguments that are no JSON."
                ) from None
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _tools(row: dict[str, Any], rules: RowRules) -> tuple[Mapping[str, Any], ...]:
    tools = row.get(TOOLS)
    if not tools and isinstance(row.get("functions"), list):
        tools = [{"type": "function", "function": function} for function in row["functions"]]
    if not tools:
        return ()
    if not rules.tools:
        raise RowError(f"has tools, which {_NEED_TEMPLATE}")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("has tools that are no list of objects.")
    return tuple(tools)


def _has_meaning(key: str, message: dict[str, Any], rules: RowRules) -> bool:
    if key in ("role", "content") or message[key] is None:
        return True
    if key == "weight":
        return rules.needs_answer and _SAME_ROLE.get(message["role"], message["role"]) == "assistant"
    if key in rules.fields:
        return key not in rules.unwritten
    return key in (CALLS, "function_call") or (key == "refusal" and message.get("content") is None)


def _check_roles(messages: tuple[Message, ...], rules: RowRules) -> None:
    roles = [message.role for message in messages]
    if roles.count("system") > 1:
        raise RowError("has more than one system message.")
    if not rules.needs_answer:
        return
    for role in ("user", "assistant"):
        if role not in roles:
            raise RowError(f"has no {role} message.")
    if not any(message.trained for message in messages if message.role == "assistant"):
        raise RowError("has no assistant message to train on: all of them have the weight 0.")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(f'"{_cut(key)}"' for key in list(row)[:5]) or "no keys"


def _cut(text: str) -> str:
    return cut(text, _SHOWN_CHARACTERS)


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
