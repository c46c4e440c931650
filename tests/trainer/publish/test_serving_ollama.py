"""Ollama's own parser and template engine read the Modelfile, and render what was trained."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from finetune_api.prompt_format import Message, PromptFormat
from finetune_trainer.publish import serving_ollama as ollama
from finetune_trainer.publish.serving_facts import ServingFacts
from tests.api.formats import APART, FORMATS, IN_USER, assistant, plain, prompt_formats, system, texts, user
from tests.tools.build import MODULES, binary

PLACE = '/models/my "guard"'


def _facts(prompt_format: PromptFormat | None, **more: Any) -> ServingFacts:
    return replace(ServingFacts(name="guard", rank=8, prompt_format=prompt_format), **more)


def _as_ollama_reads(asked: Sequence[tuple[ServingFacts, list[Message]]]) -> list[dict[str, Any]]:
    questions = [
        {"modelfile": ollama.modelfile(facts, PLACE), "conversations": [plain(messages)]} for facts, messages in asked
    ]
    program = [str(binary("modelfile"))]
    done = subprocess.run(program, input=json.dumps(questions), capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@st.composite
def _conversations(draw: st.DrawFn, prompt_format: PromptFormat) -> list[Message]:
    """Turns that alternate, as Ollama makes them; answers may bring text of the format along."""
    first = draw(texts)
    messages = [system(first)] if first else []
    literals = prompt_format.literals
    for _ in range(draw(st.integers(1, 3))):
        around = [draw(st.sampled_from(["", *ends])) for ends in (literals.starts, literals.ends)]
        messages += [user(draw(texts)), assistant(around[0] + draw(texts) + around[1])]
    return messages[:-1]


@st.composite
def _asked(draw: st.DrawFn) -> tuple[ServingFacts, list[Message]]:
    prompt_format = draw(st.sampled_from(list(FORMATS.values())) | prompt_formats())
    stops = tuple(stop for stop in draw(st.lists(texts, max_size=2)) if stop)
    facts = _facts(prompt_format, bos=draw(st.sampled_from([None, "<s>"])), stop_texts=stops, context_length=512)
    return facts, draw(_conversations(prompt_format))


# Looking for a shorter list would take minutes; the one that failed is shown.
@settings(max_examples=5, phases=(Phase.explicit, Phase.generate))
@given(st.lists(_asked(), min_size=40, max_size=60))
def test_ollama_renders_every_format_as_it_was_trained(asked: list[tuple[ServingFacts, list[Message]]]) -> None:
    for (facts, messages), found in zip(asked, _as_ollama_reads(asked), strict=True):
        assert found["error"] == ""
        commands = [tuple(command) for command in found["commands"]]
        assert commands[:2] == [("model", ollama.BASE), ("adapter", PLACE)]
        told = [text for name, text in commands if name == "stop"]
        assert told == [stop for stop in ollama.stops(facts) if stop not in ollama.unsayable_stops(facts)]
        assert facts.prompt_format is not None
        if ollama.hindrance(facts) is None:
            trained = facts.prompt_format.render_prompt(messages)
            if facts.bos and facts.prompt_format.bos.startswith(facts.bos):
                # Ollama's server adds it.
                trained = trained.removeprefix(facts.bos)
            assert found["prompts"] == [trained]


def test_a_template_can_be_read_by_people() -> None:
    assert ollama.go_template(_facts(PromptFormat(**APART))) == (
        '{{ if $.System }}<S>{{ $.System }}</S>{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}'
        '<U>{{ .Content }}</U>{{ else if eq .Role "assistant" }}{{ $answer := .Content }}'
        '{{ if and (ge (len $answer) 3) (eq (slice $answer 0 3) "<A>") }}{{ $answer = slice $answer 3 }}{{ end }}'
        '{{ if and (ge (len $answer) 4) (eq (slice $answer (len (slice $answer 4))) "</A>") }}'
        "{{ $answer = slice $answer 0 (len (slice $answer 4)) }}{{ end }}<A>{{ $answer }}</A>{{ end }}{{ end }}"
    )


def test_a_system_message_goes_into_the_first_question_alone() -> None:
    messages = [system("Be brief."), user("a"), assistant("b"), user("c")]
    (found,) = _as_ollama_reads([(_facts(PromptFormat(**IN_USER)), messages)])
    assert found["prompts"] == ["<U><S>Be brief.</S>a</U><A>b</A><U>c</U>"]


@pytest.mark.parametrize(
    ("prompt_format", "reason"),
    [
        (None, "Ollama reads no Jinja"),
        (PromptFormat(**APART, strip_whitespace=True), "strip_whitespace"),
    ],
)
def test_there_is_no_template_where_none_says_what_was_trained(prompt_format: PromptFormat | None, reason: str) -> None:
    facts = _facts(prompt_format)
    assert reason in str(ollama.hindrance(facts))
    assert "TEMPLATE" not in ollama.modelfile(facts, PLACE)
    with pytest.raises(ValueError, match=reason):
        ollama.go_template(facts)


def test_the_builders_cache_knows_the_program() -> None:
    """It goes by go.mod, which names the program's digest."""
    folder = MODULES / "ollama"
    digest = hashlib.sha256((folder / "main.go").read_bytes()).hexdigest()[:16]
    assert digest in (folder / "go.mod").read_text().splitlines()[0]
