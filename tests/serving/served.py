"""A server for each base model, with all adapters of it; one at a time, since they share a machine with the trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_api.rules_lora import VLLM_RANKS
from tests.serving import cases
from tests.serving.adapters import MAX_TOKENS, Adapter, train
from tests.serving.bases import BASES
from tests.serving.conversations import CONVERSATIONS, Messages, questions
from tests.serving.server import Server

OPTIONS: dict[str, tuple[str, ...]] = {
    # Text only: the model that sees is not set up.
    "gemma-3": ("--limit-mm-per-prompt", '{"image": 0}'),
    # Adapters of experts as PEFT writes them.
    "qwen-3-moe": ("--enable-mixed-moe-lora-format",),
    "mixtral": ("--enable-mixed-moe-lora-format",),
}
"""What a base model needs beside the usual."""

LOADING = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
"""Adapters can be loaded by a request."""

_EXPERTS = {"PYTHONPATH": str(Path(__file__).parent / "experts_in_torch"), **LOADING}
ENVIRONMENT = {"qwen-3-moe": _EXPERTS, "mixtral": _EXPERTS}
"""Variables of a base model's server."""


@dataclass(frozen=True)
class Reply:
    """One answer over HTTP."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Reply:
        """Of the server's own words, from either endpoint."""
        (choice,) = answer["choices"]
        message = choice.get("message")
        return cls(
            # /v1/completions has them in the choice.
            answer.get("prompt_token_ids") or choice["prompt_token_ids"],
            choice["token_ids"],
            choice["text"] if message is None else message["content"],
            choice["finish_reason"],
        )


@dataclass
class Served:
    """An adapter at its server."""

    adapter: Adapter
    server: Server
    leads: bool
    """The server was started with its template and its stops."""

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return self.adapter.case.name

    def ask(self, messages: Messages, **options: Any) -> Reply:
        """/v1/chat/completions."""
        if not self.leads:
            options = {"chat_template": self.adapter.template_file.read_text(), **options}
        return Reply.of(self.server.chat(self.name, messages, **{"max_tokens": MAX_TOKENS, **options}))

    def complete(self, prompt: str | Sequence[int], *, model: str | None = None, **options: Any) -> Reply:
        """/v1/completions."""
        options = {"max_tokens": MAX_TOKENS, **options}
        return Reply.of(self.server.complete(model or self.name, prompt, **options))

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """`finetune preview`'s inference_ids of each question."""
        return [row["inference_ids"] for row in self.adapter.previewed]

    @cached_property
    def peft_answers(self) -> list[list[int]]:
        """PEFT's answers to `prompt_ids`."""
        return self.adapter.peft_answers(self.prompt_ids)

    @cached_property
    def replies(self) -> list[Reply]:
        """The server's to each of `questions`, without a word about stops."""
        return [self.ask(messages) for messages in questions()]

    @cached_property
    def dialogues(self) -> list[list[Reply]]:
        """The conversations as a client has them: each answer is sent back exactly as it came.

        A stop that is a text alone is in the request, as it has to be.
        """
        stops = {"stop": self.adapter.stops["stop_strings"]} if self.adapter.case.by_text else {}
        return [self._dialogue(messages, stops) for messages in CONVERSATIONS]

    def _dialogue(self, messages: Messages, stops: dict[str, Any]) -> list[Reply]:
        said: Messages = []
        replies = []
        for message in messages:
            if message["role"] == "assistant":
                replies.append(self.ask(said, **stops))
                message = {"role": "assistant", "content": replies[-1].text}
            said.append(message)
        return replies


class Servers:
    """Trains the adapters of a base model and serves them when one of them is asked for; ends the server before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: str | None = None
        self._server: Server | None = None
        self._served: dict[str, Served] = {}
        self._failed: dict[str, BaseException] = {}

    def serving(self, case: cases.Case) -> Served:
        """The adapter of `case` at a server that runs.

        Raises:
            StartError: the server does not start.
        """
        if case.base in self._failed:
            raise self._failed[case.base]
        if self._running != case.base:
            self.stop()
            try:
                self._start(case.base)
            except BaseException as error:
                # Nobody waits for the same failure once more.
                self._failed[case.base] = error
                raise
        return self._served[case.name]

    def alone(self, command: Sequence[str], name: str, **environment: str) -> Server:
        """A server of somebody else's, in the place of the one that runs.

        Raises:
            StartError: it does not start.
        """
        self.stop()
        self._running, self._server = name, Server(command, self._folder / f"{name}.log", environment=environment)
        return self._server.start()

    def trained(self, case: cases.Case) -> Adapter:
        """The adapter of a case that nobody serves yet."""
        folder = self._folder / case.name
        model = self._folder / f"{case.base}-alone"
        if not model.exists():
            BASES[case.base](model)
        return train(case, model, folder)

    def stop(self) -> None:
        """End the server that runs, if one does."""
        if self._server is not None:
            self._server.stop()
        self._running, self._server, self._served = None, None, {}

    def _start(self, base: str) -> None:
        folder = self._folder / base
        model = BASES[base](folder / "base")
        adapters = [train(case, model, folder / case.name) for case in cases.of_base(base)]
        self._server = Server(command(adapters), folder / "server.log", environment=ENVIRONMENT.get(base)).start()
        self._running = base
        self._served = {
            adapter.case.name: Served(adapter, self._server, leads=adapter is adapters[0]) for adapter in adapters
        }


def command(adapters: Sequence[Adapter]) -> list[str]:
    """What a user types after `vllm` to serve these adapters of one base model."""
    first = adapters[0]
    rank = next(rank for rank in VLLM_RANKS if rank >= max(adapter.case.rank for adapter in adapters))
    words = ["serve", str(first.base), "--enable-lora", "--max-lora-rank", str(rank)]
    words += ["--lora-modules", *map(module, adapters)]
    words += ["--chat-template", str(first.template_file), "--generation-config", str(first.path)]
    if len(adapters) > 1:
        words.append("--trust-request-chat-template")
    return [*words, *OPTIONS.get(first.case.base, ())]


def module(adapter: Adapter) -> str:
    """The adapter as --lora-modules takes it: as JSON where its experts lie in one tensor, as PEFT has them."""
    name, path = adapter.case.name, str(adapter.path)
    if not adapter.case.lora.get("experts"):
        return f"{name}={path}"
    return json.dumps({"name": name, "path": path, "is_3d_lora_weight": True})
