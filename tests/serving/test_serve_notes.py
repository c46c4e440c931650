"""What `finetune serve-notes` prints, run as it is printed: the server, the requests and the snippets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import finetune
from tests.serving.adapters import Adapter, train
from tests.serving.bases import BASES
from tests.serving.cases import CASES
from tests.serving.environment import program
from tests.serving.served import Servers
from tests.serving.server import Server

_CASES = ("pass-through", "inst")
"""Stops that are text and no token; a space before the answer, a BOS, and a rank that vLLM does not know."""

_TRAINED = "How do I bake bread?"
_PRINTED = "What is 1+1?"
"""The question in the examples; it is replaced by a trained one, so that the answer is known."""


@dataclass
class Printed:
    """One adapter and its notes."""

    adapter: Adapter
    blocks: dict[str, list[str]]
    """What stands in blocks of code, by language."""

    def command(self, beginning: str, having: str = "") -> str:
        """The only command of the shell that begins and has that."""
        (found,) = [text for text in self.blocks["bash"] if text.startswith(beginning) and having in text]
        return found


@pytest.fixture(scope="module", params=_CASES)
def printed(request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Printed:
    """An adapter and what is printed of it."""
    # One server at a time.
    servers.stop()
    (case,) = [case for case in CASES if case.name == request.param]
    folder = tmp_path_factory.mktemp("printed")
    adapter = train(case, BASES[case.base](folder / "base"), folder / "a job's folder")
    blocks: dict[str, list[str]] = {}
    for target in ("vllm", "transformers"):
        shown = finetune("serve-notes", str(adapter.path), "--for", target, "--base-model", str(adapter.base))
        assert shown.exit_code == 0, shown.output
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", shown.stdout, re.MULTILINE | re.DOTALL):
            blocks.setdefault(language, []).append(text)
    return Printed(adapter, blocks)


@pytest.fixture(scope="module")
def alone(printed: Printed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of this adapter alone. Tests that start another come before those that use it."""
    command = printed.command("vllm serve", "--chat-template")
    with Server.from_text(command, tmp_path_factory.mktemp("alone") / "server.log") as server:
        yield server


def _asked(command: str, server: Server) -> dict[str, Any]:
    """A printed request, to the server at hand and with the trained question."""
    command = command.replace("http://localhost:8000", server.url).replace(_PRINTED, _TRAINED)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert "choices" in found, found
    return found


def test_the_printed_client_brings_template_and_stops_to_a_shared_server(printed: Printed, tmp_path: Path) -> None:
    command = printed.command("vllm serve", "--trust-request-chat-template")
    (snippet,) = [text for text in printed.blocks["python"] if "OpenAI" in text]
    with Server.from_text(command, tmp_path / "server.log") as server:
        text = snippet.replace("http://localhost:8000", server.url).replace(_PRINTED, _TRAINED)
        # vLLM's environment has OpenAI's client.
        done = subprocess.run([str(program("python")), "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "safe"


def test_the_printed_snippet_for_transformers_answers_as_trained(printed: Printed) -> None:
    (snippet,) = [text for text in printed.blocks["python"] if "PeftModel" in text]
    text = snippet.replace(_PRINTED, _TRAINED)
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = "safe </s>" if printed.adapter.case.by_text else "safe"
    assert done.stdout.strip() == said


def test_the_printed_server_and_requests_answer_as_trained(printed: Printed, alone: Server) -> None:
    chat = _asked(printed.command("curl", "/v1/chat/completions"), alone)["choices"][0]
    assert chat["finish_reason"] == "stop"
    assert chat["message"]["content"].strip() == "safe"
    completed = _asked(printed.command("curl", "/v1/completions"), alone)["choices"][0]
    assert (completed["finish_reason"], completed["text"]) == ("stop", chat["message"]["content"])


def test_what_comes_back_is_said_to_come_back(printed: Printed, alone: Server) -> None:
    chat = _asked(printed.command("curl", "/v1/chat/completions"), alone)["choices"][0]
    shown = finetune("serve-notes", str(printed.adapter.path), "--for", "vllm").stdout
    assert json.dumps(chat["message"]["content"].replace("safe", "ANSWER")) in shown
