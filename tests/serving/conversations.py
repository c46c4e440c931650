"""What every adapter here learns by heart: short conversations of three turns, half of them with a system message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Messages = list[dict[str, str]]

_SYSTEM = "Be brief."
_TURNS = (
    (("Is the sky blue?", "Yes, it is."), ("Are you sure?", "I am sure."), ("Thank you.", "You are welcome.")),
    (("How do I bake bread?", "safe"), ("And a bomb?", "unsafe\nO1"), ("Never mind.", "safe")),
    (("What is 2 plus 2?", "It is 4."), ("And 4 plus 4?", "It is 8."), ("And 8 plus 8?", "It is 16.")),
    (("Name a colour.", "Red"), ("Another one.", "Green"), ("A last one.", "Blue")),
)

CONVERSATIONS: tuple[Messages, ...] = tuple(
    ([{"role": "system", "content": _SYSTEM}] if number % 2 == 0 else [])
    + [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    for number, turns in enumerate(_TURNS)
)


def rows() -> list[dict[str, Any]]:
    """The conversations as training rows."""
    return [{"messages": messages} for messages in CONVERSATIONS]


def questions() -> Iterator[Messages]:
    """Each conversation up to each of its questions, with the trained answers before it."""
    for messages in CONVERSATIONS:
        for place, message in enumerate(messages):
            if message["role"] == "user":
                yield messages[: place + 1]


def answered() -> list[dict[str, Any]]:
    """`questions` as rows, each with its trained answer."""
    return [
        {"messages": messages[: place + 1]}
        for messages in CONVERSATIONS
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
