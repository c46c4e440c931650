"""Rows as other tools write them are read as what they mean; what is not read is answered with the row to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.outcome import Reason
from finetune_api.prompt_format import Message
from finetune_trainer.data.conversation import Conversation, RowError, RowRules, parse_row
from finetune_trainer.data.read import ReadReport, check_report, read_rows
from finetune_trainer.errors import JobError

RULES = RowRules(needs_answer=True, strip_whitespace=False)
TOOLS = RowRules(needs_answer=True, strip_whitespace=False, tools=True, fields=("reasoning_content", "tool_call_id"))
EVERYTHING = RowRules(needs_answer=False, strip_whitespace=False)
U, A, S = Message("user", "u"), Message("assistant", "a"), Message("system", "s")
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": [2]}'}}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}


def read(row: Any, rules: RowRules = RULES) -> Conversation:
    return parse_row(json.dumps(row).encode(), rules)


def refused(row: Any, rules: RowRules = RULES) -> str:
    with pytest.raises(RowError) as caught:
        read(row, rules)
    return str(caught.value)


def turn(speaker: str, value: Any = "x", **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value, **more}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
READ: dict[str, tuple[Any, tuple[Message, ...], str, tuple[str, ...]]] = {
    "OpenAI": (chat(USER, ANSWER), (U, A), "messages", ()),
    "OpenAI's developer": (chat({"role": "developer", "content": "s"}, USER, ANSWER), (S, U, A), "messages", ()),
    "parts of a text": (
        chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER),
        (Message("user", "ab"), A),
        "messages",
        (),
    ),
    "a refusal": (
        chat(USER, {"role": "assistant", "content": None, "refusal": "No."}),
        (U, Message("assistant", "No.")),
        "messages",
        (),
    ),
    "a refusal as a part": (
        chat(USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}),
        (U, Message("assistant", "No.")),
        "messages",
        (),
    ),
    "weights": (
        chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}),
        (U, Message("assistant", "a", trained=False), U, A),
        "messages",
        (),
    ),
    "nothing said": (
        chat(
            {**USER, "name": None}, {**ANSWER, "tool_calls": None, "weight": None}, tools=None, parallel_tool_calls=True
        ),
        (U, A),
        "messages",
        ("parallel_tool_calls",),
    ),
    "prompt and completion": (
        {"prompt": "u", "completion": "a", "id": 1},
        (U, A),
        "prompt and completion",
        ("id",),
    ),
    "TRL's conversations": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        (U, Message("assistant", "a", trained=False), U, A),
        "prompt and completion, each a list of messages",
        (),
    ),
    "Alpaca": (
        {"instruction": "u", "input": "", "output": "a"},
        (U, A),
        "instruction, input and output",
        (),
    ),
    "Alpaca with an input": (
        {"instruction": "i", "input": "x", "output": "a", "system": "s", "text": "t"},
        (S, Message("user", "i\n\nx"), A),
        "instruction, input and output",
        ("text",),
    ),
    "ShareGPT": (
        {"conversations": [turn("system", "s"), turn("human", "u"), turn("gpt", "a")], "id": "1"},
        (S, U, A),
        "conversations with from and value",
        ("id",),
    ),
    "ShareGPT with weights": (
        {"conversations": [turn("user", "u"), turn("model", "a", weight=0), turn("user", "u"), turn("chatgpt", "a")]},
        (U, Message("assistant", "a", trained=False), U, A),
        "conversations with from and value",
        (),
    ),
    "a system beside": (
        {"conversations": [turn("human", "u"), turn("gpt", "a")], "system": "s"},
        (S, U, A),
        "conversations with from and value",
        (),
    ),
    "a system beside a prompt": (
        {"prompt": "u", "completion": "a", "system": "s"},
        (S, U, A),
        "prompt and completion",
        (),
    ),
    "an instruction that is its input": (
        {"instruction": "", "input": "u", "output": "a"},
        (U, A),
        "instruction, input and output",
        (),
    ),
    "what a turn calls otherwise too": (
        {"conversations": [turn("human", "u", content="x", role="system"), turn("gpt", "a")]},
        (U, A),
        "conversations with from and value",
        (),
    ),
    "messages under another name": ({"conversations": [USER, ANSWER]}, (U, A), "conversations", ()),
}


@pytest.mark.parametrize(("row", "messages", "shape", "unused"), READ.values(), ids=READ)
def test_a_row_is_read_as_what_its_keys_say(
    row: Any, messages: tuple[Message, ...], shape: str, unused: tuple[str, ...]
) -> None:
    found = read(row)
    assert found.messages == messages
    assert found.shape == shape
    assert found.unused_keys == unused


SPEAKERS = "speakers are human, user, gpt, chatgpt, assistant, model, system."
PREFERENCE = (
    'has "chosen" and "rejected": preference tuning is not done. To train on what was chosen, write it as messages.'
)
REFUSED = {
    "an unknown speaker": (
        {"conversations": [turn("human"), turn("observation")]},
        "turn 2 is from 'observation', which is nobody known: " + SPEAKERS,
    ),
    "a turn that is none": (
        {"conversations": [turn("human"), "x"]},
        "turn 2 of its conversations is not an object with from and value.",
    ),
    "no list of turns": ({"conversations": "x"}, '"conversations" must be a list of objects with from and value.'),
    "preferences": (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        PREFERENCE,
    ),
    "an input that is no text": (
        {"instruction": "Add one.", "input": 41, "output": "42"},
        'has an "input" that is no text.',
    ),
    "a system that is no text": (
        {"instruction": "i", "output": "o", "system": ["s"]},
        'has a "system" that is no text.',
    ),
    "an empty completion": ({"prompt": "p", "completion": ""}, "message 2 (assistant) has an empty content."),
    "an output that is no text": (
        {"instruction": "i", "output": 3},
        "message 2 (assistant) has a content that is a number: write it as one string.",
    ),
    "a plain text": ({"text": "t"}, 'has no "messages" (it has "text").'),
}


@pytest.mark.parametrize(("row", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_is_not_what_its_keys_say_is_named(row: Any, sentence: str) -> None:
    assert refused(row) == sentence


def test_a_plain_text_is_trained_on_where_every_token_is() -> None:
    found = read({"text": "Once.", "source": "s"}, EVERYTHING)
    assert (found.text, found.messages, found.shape, found.unused_keys) == ("Once.", (), "text", ("source",))
    assert refused({"text": ""}, EVERYTHING) == '"text" must be a text that is not empty.'


def test_tools_and_calls_go_to_a_template_that_knows_them() -> None:
    found = read(
        chat(
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "c1", "content": "r", "name": "f"},
            ANSWER,
            tools=[SCHEMA],
        ),
        TOOLS,
    )
    call = {**CALL, "function": {"name": "f", "arguments": {"b": 1, "a": [2]}}}
    assert found.messages == (
        U,
        Message("assistant", "", fields={"tool_calls": [call], "reasoning_content": "Hm."}),
        Message("tool", "r", fields={"tool_call_id": "c1"}),
        A,
    )
    # In the row's own order.
    assert json.dumps(found.tools) == json.dumps([SCHEMA])
    assert found.unused_keys == ("messages[].name",)


def test_functions_are_tools_of_former_times() -> None:
    called = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": '{"n": 123456789012345678901}'},
    }
    result = {"role": "function", "name": "f", "content": "r"}
    found = read(chat(USER, called, result, ANSWER, functions=[SCHEMA["function"]]), TOOLS)
    assert found.tools == (SCHEMA,)
    call = {"type": "function", "function": {"name": "f", "arguments": {"n": 123456789012345678901}}}
    assert found.messages[1:3] == (Message("assistant", "", fields={"tool_calls": [call]}), Message("tool", "r"))
    both = read(chat(USER, ANSWER, tools=[SCHEMA], functions=[SCHEMA["function"]]), TOOLS)
    assert both.unused_keys == ("functions",)


def test_where_all_is_trained_no_answer_is_left_out() -> None:
    found = read({"prompt": [USER, ANSWER], "completion": [ANSWER]}, EVERYTHING)
    assert all(message.trained for message in found.messages)
    assert found.unused_keys == ()
    weighed = read(chat(USER, {**ANSWER, "weight": 0}), EVERYTHING)
    assert all(message.trained for message in weighed.messages)
    assert weighed.unused_keys == ("messages[].weight",)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"tool_calls": {}}, None),
        ({"tool_calls": "f"}, "message 2 has tool_calls that are no list of objects."),
        ({"tool_calls": [{"id": "c1"}]}, "message 2 has a tool call without the name of a function."),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "message 2 calls f with arguments that are no JSON.",
        ),
    ],
)
def test_calls_that_cannot_be_written_are_named(message: dict[str, Any], sentence: str | None) -> None:
    row = chat(USER, {**ANSWER, **message})
    if sentence is None:
        assert read(row, TOOLS).messages == (U, A)
    else:
        assert refused(row, TOOLS) == sentence


def report_of(tmp_path: Path, *rows: Any) -> ReadReport:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ReadReport()
    list(read_rows(path, RULES, report))
    return report


def test_rows_of_several_kinds_are_refused(tmp_path: Path) -> None:
    report = report_of(tmp_path, chat(USER, ANSWER), {"prompt": "p", "completion": "c"}, chat(USER, ANSWER))
    with pytest.raises(JobError) as caught:
        check_report("train.jsonl", report, 0.5)
    assert caught.value.reason is Reason.DATA_INVALID
    assert str(caught.value) == (
        "train.jsonl has rows of several kinds (line 1: messages; line 2: prompt and completion): write all of them as "
        "one."
    )


def test_who_wrote_another_shape_is_shown_the_row_to_write(tmp_path: Path) -> None:
    report = report_of(tmp_path, {"question": "How far is it?", "n": 3, "answer": "Two miles."})
    with pytest.raises(JobError) as caught:
        check_report("train.jsonl", report, 0.5)
    messages = [{"role": "user", "content": "How far is it?"}, {"role": "assistant", "content": "Two miles."}]
    assert f"A row looks like {json.dumps({'messages': messages})}. No row is left" in str(caught.value)


RULES_KEYS = (
    *("messages", "role", "content", "conversations", "from", "value", "prompt", "completion", "instruction", "input"),
    *("output", "chosen", "rejected", "text", "weight", "tools", "functions", "tool_calls", "function", "name"),
    *("arguments", "type", "refusal", "reasoning_content"),
)
_WORDS = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "", "x", "{}"])
_KEYS = st.sampled_from([*RULES_KEYS])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_nan=False) | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=20,
)
_MESSAGE = st.fixed_dictionaries(
    {"role": _WORDS, "content": _JSON},
    optional={"tool_calls": _JSON, "weight": _JSON, "refusal": _JSON, "name": _JSON, "reasoning_content": _JSON},
)


_ROW = st.fixed_dictionaries(
    {"messages": st.lists(_MESSAGE, max_size=4)}, optional={"tools": _JSON, "functions": _JSON}
)


@given(row=st.dictionaries(_KEYS, _JSON, max_size=5) | _ROW, rules=st.sampled_from([RULES, TOOLS, EVERYTHING]))
def test_any_row_is_a_conversation_or_gets_a_sentence(row: Any, rules: RowRules) -> None:
    found = read_or_sentence(row, rules)
    if isinstance(found, str):
        assert found.endswith(".")
    else:
        assert found.text is not None or found.messages
        assert all(isinstance(message.content, str) for message in found.messages)


def read_or_sentence(row: Any, rules: RowRules) -> Conversation | str:
    try:
        return read(row, rules)
    except RowError as error:
        return str(error)
