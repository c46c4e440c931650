"""A conversation with a model here or behind a server: what was generated goes back as history, as it was trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.published.folder import open_adapter
from finetune_trainer.published.stops import Stops
from finetune_trainer.verify.http import RefusedError, Server, ServerError


@dataclass(frozen=True)
class Answer:
    """One answer of a model."""

    text: str
    """The assistant's message, without its end-of-turn and what else the format writes around it."""
    said: str
    """What was generated before the stop: a server's content."""
    prompt: str | None
    """The text the model was given; a server does not tell."""
    tokens: int | None
    """Number of tokens generated, those of the end-of-turn included; None where a server does not tell."""
    finish_reason: Literal["stop", "length"]
    """stop: the model ended its turn; length: it was cut off."""


class Answerer(Protocol):
    """Whatever answers a conversation."""

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """The next message.

        Args:
            messages: `{"role", "content"}` each, the last one the user's.
            max_new_tokens: longest answer, in tokens.
            on_text: receives the answer, piece by piece where it comes so.

        Raises:
            JobError: there is none.
        """
        ...


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, answerer: Answerer, *, system: str | None, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self._answerer = answerer
        self._messages: list[dict[str, str]] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})

    def ask(self, message: str, on_text: Callable[[str], None] | None = None) -> dict[str, str | int | None]:
        """Send one user message: `{"message", "answer", "prompt", "finish_reason", "tokens"}`."""
        self._messages.append({"role": "user", "content": message})
        answer = self._answerer.answer(self._messages, max_new_tokens=self.max_new_tokens, on_text=on_text)
        self._messages.append({"role": "assistant", "content": answer.said})
        return {
            "message": message,
            "answer": answer.text,
            "prompt": answer.prompt,
            "finish_reason": answer.finish_reason,
            "tokens": answer.tokens,
        }


class Served:
    """An adapter behind an OpenAI-compatible server, asked greedily."""

    def __init__(self, server: Server, name: str, stops: Stops) -> None:
        self._server = server
        self._name = name
        self._stops = stops

    @classmethod
    def of(cls, address: str, server: Server, name: str) -> Self:
        """The adapter at `address`, which `server` has under `name`.

        Raises:
            JobError: there is no adapter, or it cannot be had.
        """
        with tempfile.TemporaryDirectory(prefix="finetune-chat-") as scratch:
            folder = open_adapter(address, Path(scratch), weights=False)
            return cls(server, name, Stops.read(folder.path, None))

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """As `Answerer.answer`; stops that are text are sent along, since no server reads them from a file."""
        body: dict[str, Any] = {
            "model": self._name,
            "messages": [dict(message) for message in messages],
            "temperature": 0,
            "max_tokens": max_new_tokens,
        }
        if self._stops.texts:
            body["stop"] = list(self._stops.texts)
        try:
            content = self._server.post("/chat/completions", body)
        except RefusedError as error:
            raise JobError(Reason.INVALID_SPEC, f"The server refuses this conversation: {error}") from error
        try:
            (choice, *_) = content["choices"]
            said = choice["message"]["content"] or ""
            finish: Literal["stop", "length"] = "length" if choice.get("finish_reason") == "length" else "stop"
            usage = content.get("usage") or {}
            tokens = usage.get("completion_tokens")
            text = self._stops.literals.without(said)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                "The server's answer is no chat completion: it is no OpenAI-compatible server."
            ) from error
        if on_text is not None:
            on_text(text)
        return Answer(text, said, None, tokens if isinstance(tokens, int) else None, finish)
