"""Commands and snippets mean what they should, whatever an adapter and its folder are called."""

from __future__ import annotations

import ast
import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.prompt_format import PromptFormat
from finetune_trainer.publish import serving_commands as commands
from finetune_trainer.publish.serving_facts import ServingFacts
from tests.api.formats import LLAMA_3, prompt_formats, texts

_SHOW = 'show() { printf "%s\\0" "$@"; }\nvllm() { show vllm "$@"; }\ncurl() { show curl "$@"; }\n'

words = texts.filter(lambda text: "\0" not in text)
"""What a shell can be given at all."""


def _as_bash_reads(command: str) -> list[str]:
    """The words of a command, by a real shell."""
    done = subprocess.run(["bash", "-c", _SHOW + command], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def _facts(**more: Any) -> ServingFacts:
    return replace(ServingFacts(name="guard", base="acme/model", rank=8, stop_ids=(2,)), **more)


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        (
            _facts(rank=24),
            (
                "vllm serve acme/model --enable-lora --max-lora-rank 32 --lora-modules guard=/a --chat-template "
                "/a/chat_template.jinja --generation-config /a"
            ),
        ),
        (
            _facts(base=None, revision="abc"),
            (
                "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --lora-modules guard=/a --chat-template "
                "/a/chat_template.jinja --generation-config /a"
            ),
        ),
        (
            _facts(revision="abc"),
            (
                "vllm serve acme/model --revision abc --enable-lora --max-lora-rank 8 --lora-modules guard=/a "
                "--chat-template /a/chat_template.jinja --generation-config /a"
            ),
        ),
    ],
)
def test_the_command_is_complete(facts: ServingFacts, command: str) -> None:
    assert " ".join(commands.vllm_command(facts, "/a").split(" \\\n  ")) == command


def test_a_server_of_several_adapters_takes_their_templates_from_requests() -> None:
    assert _as_bash_reads(commands.vllm_shared_command(_facts(), "/a"))[-1] == "--trust-request-chat-template"
    assert "--chat-template" not in commands.vllm_shared_command(_facts(), "/a")


@given(name=words, place=words)
@example(name="a=b", place="/c")
@example(name="a", place="/c,d")
@example(name="", place="/c")
@example(name="'$(id)`id`\n", place="/x\\\ny z")
def test_a_shell_reads_what_was_meant(name: str, place: str) -> None:
    read = _as_bash_reads(commands.vllm_command(_facts(name=name), place))
    options = dict(zip(read[4::2], read[5::2], strict=True))
    assert read[:4] == ["vllm", "serve", "acme/model", "--enable-lora"]
    assert options["--chat-template"] == f"{place}/chat_template.jinja"
    assert options["--generation-config"] == place
    assert _as_vllm_reads(options["--lora-modules"]) == (name, place)


def _as_vllm_reads(module: str) -> tuple[str, str]:
    """As its LoRAParserAction does, in 0.32."""
    if "=" in module and "," not in module:
        name, path = module.split("=", 1)
        return name, path
    found = json.loads(module)
    return found["name"], found["path"]


@given(name=words, stops=st.lists(words, max_size=2), prompt_format=prompt_formats())
def test_requests_are_what_was_meant(name: str, stops: list[str], prompt_format: PromptFormat) -> None:
    facts = _facts(name=name, stop_texts=tuple(stops), prompt_format=prompt_format)
    for request, path in (
        (commands.chat_request(facts), "chat/completions"),
        (commands.completions_request(facts), "completions"),
    ):
        assert request is not None
        read = _as_bash_reads(request)
        assert read[:-1] == [
            "curl",
            f"http://localhost:8000/v1/{path}",
            "-H",
            "Content-Type: application/json",
            "-d",
        ]
        body = json.loads(read[-1])
        assert (body["model"], body.get("stop", []), body["temperature"]) == (name, stops, 0)
        if path == "completions":
            assert (body["prompt"], body["add_special_tokens"]) == (facts.example_prompt, False)


@pytest.mark.parametrize(("bos", "begins"), [("<|begin_of_text|>", 1), (None, 1), ("<s>", 1)])
def test_a_rendered_prompt_begins_with_one_bos(bos: str | None, begins: int) -> None:
    prompt = _facts(prompt_format=LLAMA_3, bos=bos).example_prompt
    assert prompt is not None
    assert prompt.count(bos or "<|begin_of_text|>") == begins


def test_there_is_no_rendered_prompt_where_only_the_template_knows() -> None:
    assert commands.completions_request(_facts()) is None


@given(name=texts, place=texts, stops=st.lists(texts, max_size=2))
def test_snippets_are_python_with_what_was_meant(name: str, place: str, stops: list[str]) -> None:
    facts = _facts(name=name, stop_texts=tuple(stops), base=None)
    told = _constants(commands.client_snippet(facts, place))
    assert {name, f"{place}/chat_template.jinja", *stops} <= told
    assert {place, "BASE_MODEL"} <= _constants(commands.transformers_snippet(facts, place))


def test_a_snippet_loads_the_commit_that_was_trained_on() -> None:
    assert 'from_pretrained("acme/model", revision="abc", dtype=' in commands.transformers_snippet(
        _facts(revision="abc"), "/a"
    )


def _constants(snippet: str) -> set[Any]:
    return {node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)}
