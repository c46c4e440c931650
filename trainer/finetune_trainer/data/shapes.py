"""Rows as other tools write them -> messages.

A row's keys say what it is. What is read so is counted by name, so that people are told, and a file whose rows are of
several kinds is refused: which of them was meant nobody can tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

MESSAGES = "messages"
"""The shape that needs no notice: OpenAI's chat rows."""

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
"""ShareGPT's names."""

_SHOWN_CHARACTERS = 40


class ShapeError(ValueError):
    """A row of a known shape that does not hold what it must; the text is one sentence without the line number."""


@dataclass(frozen=True)
class Shaped:
    """A row's parts under the names that messages have."""

    shape: str
    messages: Any
    used: frozenset[str]
    """Keys of the row that had a meaning."""
    untrained: frozenset[int] = frozenset()
    """Numbers of messages, from 1, that belong to the prompt."""


@dataclass(frozen=True)
class _Shape:
    keys: frozenset[str]
    """A row that has all of them is of this shape."""
    read: Callable[[Row], Shaped]


def shaped(row: Row) -> Shaped | None:
    """`row` by the first shape whose keys it has; None where it has those of none.

    Raises:
        ShapeError: it has the keys of a shape, and not what they must hold.
    """
    for shape in _SHAPES:
        if shape.keys <= row.keys():
            return shape.read(row)
    return None


def example_of(row: Row) -> str:
    """The row that would be read, made of the texts of one that is not."""
    texts = [value for value in row.values() if isinstance(value, str) and value.strip()]
    user, answer = ([*texts, "…", "…"])[:2]
    messages = [{"role": role, "content": cut(text)} for role, text in (("user", user), ("assistant", answer))]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _chat(row: Row) -> Shaped:
    return Shaped(MESSAGES, row["messages"], frozenset({"messages"}))


def _sharegpt(row: Row) -> Shaped:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise ShapeError('"conversations" must be a list of objects with from and value.')
    if turns and all(isinstance(turn, dict) and "role" in turn and "from" not in turn for turn in turns):
        return Shaped("conversations", [*_system(row), *turns], _CONVERSATIONS | {"system"})
    found = [*_system(row), *(_turn(*each) for each in enumerate(turns, 1))]
    return Shaped("conversations with from and value", found, _CONVERSATIONS | {"system"})


def _turn(number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise ShapeError(f"turn {number} of its conversations is not an object with from and value.")
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_SPEAKERS)
        raise ShapeError(f"turn {number} is from {cut(repr(speaker))}, which is nobody known: speakers are {known}.")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": role, "content": turn["value"]}


def _prompt_and_completion(row: Row) -> Shaped:
    prompt, completion = row["prompt"], row["completion"]
    used = frozenset({"prompt", "completion", "system"})
    system = _system(row)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [*system, *prompt]
        untrained = frozenset(range(1, len(before) + 1))
        name = "prompt and completion, each a list of messages"
        return Shaped(name, [*before, *completion], used, untrained)
    return Shaped("prompt and completion", [*system, *_question_and_answer(prompt, completion)], used)


def _instruction(row: Row) -> Shaped:
    parts = [row["instruction"], row.get("input")]
    for name, part in zip(("instruction", "input"), parts, strict=True):
        if part is not None and not isinstance(part, str):
            raise ShapeError(f'has an "{name}" that is no text.')
    question = "\n\n".join(part for part in parts if part and part.strip())
    messages = [*_system(row), *_question_and_answer(question, row["output"])]
    return Shaped("instruction, input and output", messages, frozenset({"instruction", "input", "output", "system"}))


def _system(row: Row) -> list[dict[str, Any]]:
    """The system message that stands beside the others; an empty one is none."""
    text = row.get("system")
    if text is not None and not isinstance(text, str):
        raise ShapeError('has a "system" that is no text.')
    return [{"role": "system", "content": text}] if text and text.strip() else []


def _preference(_: Row) -> Shaped:
    raise ShapeError(
        'has "chosen" and "rejected": preference tuning is not done. To train on what was chosen, write it as messages.'
    )


def _question_and_answer(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def cut(text: str, most: int = _SHOWN_CHARACTERS) -> str:
    """`text` as a sentence shows it."""
    return text if len(text) <= most else text[:most] + "…"


_CONVERSATIONS = frozenset({"conversations"})
_SHAPES = (
    _Shape(frozenset({"messages"}), _chat),
    _Shape(_CONVERSATIONS, _sharegpt),
    _Shape(frozenset({"chosen", "rejected"}), _preference),
    _Shape(frozenset({"prompt", "completion"}), _prompt_and_completion),
    _Shape(frozenset({"instruction", "output"}), _instruction),
)
