"""A real `vllm serve`, started with a command line as a user types it, and stopped with all that it started."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests import processes
from tests.serving.environment import program

_START_SECONDS = 300
_ANSWER_SECONDS = 120

ON_THIS_MACHINE = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "4")
"""What a small server on a CPU needs beside the user's own words: a precision to compare in, and little memory."""

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class Server:
    """One server, and how it is asked. As a context manager it is stopped at the end.

    Args:
        command: what a user types after `vllm`: `["serve", MODEL, "--enable-lora", ...]`, without host and port.
        log: where its output goes.
        environment: variables of its own.
    """

    def __init__(self, command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None) -> None:
        port = processes.unused_port()
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=_ANSWER_SECONDS, trust_env=False)
        here = ("--host", "127.0.0.1", "--port", str(port))
        self._process = processes.Server(
            "vllm serve",
            [program(), *command, *ON_THIS_MACHINE, *here],
            log,
            self._answers,
            environment=_ENVIRONMENT | dict(environment or {}),
            # The server's libraries are its own.
            without="PYTHON",
        )

    @classmethod
    def from_text(cls, command: str, log: Path, *, environment: Mapping[str, str] | None = None) -> Self:
        """The same from a line as it is printed for people: `vllm serve …`, with or without line breaks."""
        # To shlex a line that goes on is no line's end.
        words = [word for word in shlex.split(command) if word != "\n"]
        assert words[0] == "vllm", command
        return cls(words[1:], log, environment=environment)

    def start(self) -> Self:
        """Start it and wait until it answers.

        Raises:
            StartError: it ended, or took too long; the text has the end of its log.
        """
        self._process.launch()
        try:
            self._process.wait_ready(_START_SECONDS)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it and all that it started, for good; again is no error."""
        self.client.close()
        self._process.stop()
        with suppress(ProcessLookupError, RuntimeError):
            # Its engine and workers, where it could not wait for them: one process group.
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.stop()

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """Whatever it answers, refusals too."""
        return self.client.post(path, json=dict(body))

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> dict[str, Any]:
        """The answer of /v1/chat/completions, greedy and with token ids.

        Raises:
            AssertionError: the server refused.
        """
        return self._asked("/v1/chat/completions", {"model": model, "messages": list(messages), **options})

    def complete(self, model: str, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        """The answer of /v1/completions, likewise.

        Raises:
            AssertionError: the server refused.
        """
        return self._asked("/v1/completions", {"model": model, "prompt": prompt, **options})

    def log(self) -> str:
        """All that it said."""
        return self._process.log.read_text(errors="replace")

    def _asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self.post(path, {"temperature": 0, "return_token_ids": True, **body})
        assert response.status_code == httpx.codes.OK, response.text[:2000]
        found: dict[str, Any] = response.json()
        return found

    def _answers(self) -> bool:
        try:
            return self.client.get("/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False
