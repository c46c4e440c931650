"""Tools, calls and results become what each published chat template makes of them, and the calls are trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_trainer.data.conversation import RowRules, parse_row
from finetune_trainer.data.render import FIELDS, TemplateRenderer, renderings_of, takes_tools, unwritten_fields
from tests.real_tokenizers import published_templates

NOT_ALIKE = {
    # It writes a thought that its prompt for an answer has closed already.
    "qwen3_5_nothink",
    # Their text for an answer does not begin with their own generation prompt.
    *(f"nemotron_3_{size}" for size in ("5_lightning", "ultra", "nano", "super")),
}
TEMPLATES = published_templates()
WITH_TOOLS = [name for name, model in TEMPLATES.items() if takes_tools(model.tokenizer.chat_template)]
CALL = {"name": "weather", "arguments": {"city": "Paris", "days": [1, 2]}}
KEYS = {"tool_call_id", "name", "reasoning_content"}
ROW: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is the weather in Paris?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call12345",
                    "type": "function",
                    "function": {"name": "weather", "arguments": json.dumps(CALL["arguments"])},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": "Sunny."},
        {"role": "assistant", "content": "It is sunny.", "reasoning_content": "The tool says so."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ],
}


def test_most_published_templates_know_tools() -> None:
    assert len(WITH_TOOLS) > 20
    assert set(WITH_TOOLS) >= NOT_ALIKE


@pytest.mark.parametrize("name", [name for name in WITH_TOOLS if name not in NOT_ALIKE])
def test_a_row_with_tools_is_the_templates_own_text_with_calls_and_answers_trained(name: str) -> None:
    tokenizer = TEMPLATES[name].tokenizer
    template = tokenizer.chat_template
    rules = RowRules(True, False, tools=True, fields=FIELDS, unwritten=unwritten_fields(template))
    conversation = parse_row(json.dumps(ROW).encode(), rules)
    found = renderings_of(TemplateRenderer(tokenizer), conversation)
    # As a server is given it: arguments as an object, no content as an empty one.
    messages: list[dict[str, Any]] = [{**message, "content": message["content"] or ""} for message in ROW["messages"]]
    messages[2]["tool_calls"] = [{**messages[2]["tool_calls"][0], "function": CALL}]
    wanted = tokenizer.apply_chat_template(messages, tools=ROW["tools"], tokenize=False)
    assert found[0].text == wanted
    # Of a thought before an answer not every template keeps what lies behind.
    assert {key.removeprefix("messages[].") for key in conversation.unused_keys} == set(rules.unwritten) & KEYS
    trained = [rendering.text[turn.prompt_end : turn.end] for rendering in found for turn in rendering.turns]
    assert len(trained) == 2
    assert sum("It is sunny." in text for text in trained) == 1
    (call,) = [text for text in trained if "It is sunny." not in text]
    assert "weather" in call
    assert "Paris" in call
    # What the tool answered is not the model's.
    assert not any("Sunny." in text for text in trained)
