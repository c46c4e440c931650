"""`finetune chat --server`: a served adapter answers, and what it said goes back to it as history."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import finetune, finetune_json
from tests.trainer.verify.canned import Setup, adapter_folder, cases, serving

PROMPT_FORMAT = 'prompt_format: {system: "{instruction}", user: "{instruction}", assistant: " {instruction} </s>"}\n'


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = adapter_folder(tmp_path / "adapter", cases())
    (folder / "prompt_format.yaml").write_text(PROMPT_FORMAT)
    return folder


def ask(adapter: Path, url: str, *more: str) -> list[str]:
    return ["chat", str(adapter), "--server", url, "--model", "guard", "-m", cases()[0].messages[0].content, *more]


def test_the_message_is_shown_and_what_was_said_is_history(adapter: Path) -> None:
    setup = Setup(cases())
    with serving(setup) as url:
        first, second = finetune_json(*ask(adapter, url, "-m", "w40"))
    said = setup.bodies[1]["messages"][1]
    assert said["role"] == "assistant"
    assert first["answer"] == said["content"].strip()
    assert (first["finish_reason"], second["message"]) == ("stop", "w40")
    assert setup.bodies[0]["temperature"] == 0
    assert "stop" not in setup.bodies[0]


def test_a_stop_that_is_text_is_sent_along(adapter: Path) -> None:
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2], "stop_strings": ["</s>"]}')
    setup = Setup(cases())
    with serving(setup) as url:
        finetune_json(*ask(adapter, url))
    assert setup.bodies[0]["stop"] == ["</s>"]


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        (
            {"template": "none"},
            [],
            "The server refuses this conversation: 400: default chat template is no longer allowed",
        ),
        ({"token": "secret"}, [], "--api-key-env"),
        ({"html": True}, [], "no OpenAI-compatible server"),
        ({}, ["--base-model", "x"], "leave --server out"),
        ({}, ["--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_what_does_not_answer_is_a_sentence(
    adapter: Path, changes: dict[str, object], arguments: list[str], sentence: str
) -> None:
    with serving(Setup(cases(), **changes)) as url:  # type: ignore[arg-type]  # a table of settings
        result = finetune(*ask(adapter, url, *arguments))
    assert result.exit_code not in (0, None)
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
