"""Every shape of row that is no conversation is named in a sentence of its own; everything else is kept verbatim."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.prompt_format import Message
from finetune_trainer.data.conversation import Conversation, RowError, RowRules, parse_row

RULES = RowRules(needs_answer=True, strip_whitespace=False)
USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def row(*messages: Any, **more: Any) -> bytes:
    """One line of a data file."""
    return json.dumps({"messages": list(messages), **more}).encode()


ROLES = "roles are system, user and assistant."
NEED_TEMPLATE = (
    "generation_config.prompt_format cannot write: only `use_hugging_face_chat_template: true` can, where the model's "
    "chat template knows tools."
)
JSON_LIST = "is a JSON list: write one object per line, not one list for the whole file."
NO_MESSAGES = '"messages" must be a list with at least one user and one assistant message.'
BAD: list[tuple[bytes, str]] = [
    # Not JSON
    (b"hello", "is not JSON (unexpected character, expected a JSON value at column 1)."),
    (b'{"messages": [', "is not JSON (unexpected end of data at column 15)."),
    (b"{", "is not JSON (unexpected end of data at column 2)."),
    (b'{"messages": []} {}', "is not JSON (unexpected content after document at column 18)."),
    (b"{'messages': []}", "is not JSON ("),
    (b'{"messages": NaN}', "is not JSON (unexpected character, expected a JSON value at column 14)."),
    (b'{"messages": [],}', "is not JSON (trailing comma is not allowed at column 16)."),
    (b"\x1f\x8b\x08", "is not JSON (str is not valid UTF-8: surrogates not allowed at column 1). Convert the file to"),
    ('{"messages": [{"role": "user", "content": "é"}]}'.encode("latin-1"), "is not JSON (str is not valid UTF-8"),
    ('{"messages": []}'.encode("utf-16"), "is not JSON (str is not valid UTF-8"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "is not JSON (no low surrogate in string"),
    (b'{"messages": "\xed\xa0\x80"}', "is not JSON (str is not valid UTF-8"),
    (b'{"messages":' + b"[" * 5000, "is not JSON (depth limit exceeded"),
    # JSON, but no object
    (b"[]", JSON_LIST),
    (b'[{"messages": []}]', JSON_LIST),
    (b"[\n", JSON_LIST),
    (b' [{"messages": []},\n', JSON_LIST),
    (b'"text"', 'is not a JSON object with "messages".'),
    (b"1", 'is not a JSON object with "messages".'),
    (b"null", 'is not a JSON object with "messages".'),
    # No list of messages
    (b"{}", 'has no "messages" (it has no keys).'),
    (b'{"question": "p", "answer": "c"}', 'has no "messages" (it has "question", "answer").'),
    (b'{"Messages": []}', 'has no "messages" (it has "Messages").'),
    (b'{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1}', 'has no "messages" (it has "a", "b", "c", "d", "e").'),
    (json.dumps({"k" * 10**6: 1}).encode(), f'has no "messages" (it has "{"k" * 60}…").'),
    (b'{"messages": null}', NO_MESSAGES),
    (b'{"messages": "u"}', NO_MESSAGES),
    (b'{"messages": {"role": "user", "content": "u"}}', NO_MESSAGES),
    (row(), NO_MESSAGES),
    # Messages
    (row("u"), "message 1 is not an object with role and content."),
    (row(USER, None), "message 2 is not an object with role and content."),
    (row(USER, ["assistant", "a"]), "message 2 is not an object with role and content."),
    (row({"content": "u"}), f"message 1 has no role: {ROLES}"),
    (row({"role": None, "content": "u"}), f"message 1 has no role: {ROLES}"),
    (row({"from": "human", "value": "u"}), f"message 1 has no role: {ROLES}"),
    (row(USER, {"role": "tool", "content": "t"}), f"message 2 is a tool's result, which {NEED_TEMPLATE}"),
    (row(USER, {**ASSISTANT, "tool_calls": [{}]}), f"message 2 (assistant) calls tools, which {NEED_TEMPLATE}"),
    (
        row(USER, {**ASSISTANT, "function_call": {"name": "f"}}),
        f"message 2 (assistant) calls tools, which {NEED_TEMPLATE}",
    ),
    (row(USER, ASSISTANT, tools=[{}]), f"has tools, which {NEED_TEMPLATE}"),
    (row(USER, ASSISTANT, functions=[{}]), f"has tools, which {NEED_TEMPLATE}"),
    (row({"role": "User", "content": "u"}), f"message 1 has the unknown role 'User': {ROLES}"),
    (row({"role": "", "content": "u"}), f"message 1 has the unknown role '': {ROLES}"),
    (row({"role": 1, "content": "u"}), f"message 1 has the unknown role 1: {ROLES}"),
    (row({"role": ["user"], "content": "u"}), f"message 1 has the unknown role ['user']: {ROLES}"),
    (row({"role": "r" * 10**6, "content": "u"}), f"message 1 has the unknown role '{'r' * 59}…: {ROLES}"),
    (row({"role": "user"}), "message 1 (user) has no content."),
    (row(USER, {"role": "assistant", "text": "a"}), "message 2 (assistant) has no content."),
    (
        row(USER, {"role": "assistant", "content": None}),
        "message 2 (assistant) has a content that is null: write it as one string.",
    ),
    (
        row({"role": "user", "content": []}),
        "message 1 (user) has a content that is a list: write it as one string.",
    ),
    (
        row({"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "image_url", "image_url": {}}]}),
        "message 1 (user) has a part of type 'image_url': only texts are trained on.",
    ),
    (
        row({"role": "user", "content": ["u"]}),
        "message 1 (user) has a part that is no object with type and text: only texts are trained on.",
    ),
    (
        row(USER, {**ASSISTANT, "weight": 0.5}),
        "message 2 (assistant) has the weight 0.5: a weight is 0 or 1.",
    ),
    (
        row(USER, {**ASSISTANT, "weight": 0}),
        "has no assistant message to train on: all of them have the weight 0.",
    ),
    (row({"role": "user", "content": {}}), "message 1 (user) has a content that is an object: write it as one string."),
    (row({"role": "user", "content": 1}), "message 1 (user) has a content that is a number: write it as one string."),
    (row({"role": "user", "content": 1.5}), "message 1 (user) has a content that is a number: write it as one string."),
    (
        row({"role": "user", "content": True}),
        "message 1 (user) has a content that is true or false: write it as one string.",
    ),
    (row({"role": "user", "content": ""}, ASSISTANT), "message 1 (user) has an empty content."),
    (row({"role": "system", "content": ""}, USER, ASSISTANT), "message 1 (system) has an empty content."),
    # The conversation
    (row(ASSISTANT), "has no user message."),
    (row(SYSTEM, ASSISTANT), "has no user message."),
    (row(USER), "has no assistant message."),
    (row(SYSTEM, USER), "has no assistant message."),
    (row(SYSTEM, USER, ASSISTANT, SYSTEM), "has more than one system message."),
]


@pytest.mark.parametrize(("line", "sentence"), BAD, ids=[repr(line[:50]) for line, _ in BAD])
def test_a_row_that_is_no_conversation_is_named(line: bytes, sentence: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(line, RULES)
    said = str(caught.value)
    # Some of the JSON library's own words are left to it.
    assert said == sentence if sentence.endswith(".") else said.startswith(sentence)


@pytest.mark.parametrize(
    "roles",
    [
        ["user", "assistant"],
        ["system", "user", "assistant"],
        ["user", "assistant", "user", "assistant"],
        ["user", "assistant", "user"],
        ["user", "user", "assistant"],
        ["assistant", "user"],
        ["user", "system", "assistant"],
    ],
)
def test_order_is_the_rows_own_affair(roles: list[str]) -> None:
    messages = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    read = parse_row(row(*messages), RULES)
    assert read == Conversation(tuple(Message(role, str(number)) for number, role in enumerate(roles)))


@given(st.text(min_size=1))
def test_content_is_kept_verbatim(content: str) -> None:
    for ascii_only in (True, False):
        messages = [{"role": "user", "content": content}, ASSISTANT]
        line = json.dumps({"messages": messages}, ensure_ascii=ascii_only).encode() + b"\r\n"
        assert parse_row(line, RULES).messages == (Message("user", content), Message("assistant", "a"))


@pytest.mark.parametrize("content", [" ", "\n\t", "\xa0"])
def test_white_space_alone_is_empty_only_where_the_format_strips_it(content: str) -> None:
    line = row({"role": "user", "content": content}, ASSISTANT)
    assert parse_row(line, RULES).messages[0].content == content
    with pytest.raises(RowError, match=r"message 1 \(user\) has an empty content."):
        parse_row(line, RowRules(needs_answer=True, strip_whitespace=True))


@pytest.mark.parametrize("messages", [[USER], [ASSISTANT], [SYSTEM], [SYSTEM, USER]])
def test_a_row_without_an_answer_is_enough_where_every_token_is_trained_on(messages: list[Any]) -> None:
    everything = RowRules(needs_answer=False, strip_whitespace=False)
    assert len(parse_row(row(*messages), everything).messages) == len(messages)


def test_two_system_messages_are_too_many_whatever_is_trained_on() -> None:
    with pytest.raises(RowError, match="has more than one system message"):
        parse_row(row(SYSTEM, SYSTEM), RowRules(needs_answer=False, strip_whitespace=False))


def test_keys_without_a_meaning_are_reported_once_each() -> None:
    line = row({**USER, "name": "n", "weight": 0}, {**ASSISTANT, "weight": 1}, id=7, source="s")
    assert parse_row(line, RULES).unused_keys == ("id", "source", "messages[].name", "messages[].weight")
    assert parse_row(row(USER, ASSISTANT), RULES).unused_keys == ()


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.sampled_from(["user", "assistant", "system", "", "x"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(_JSON | st.fixed_dictionaries({"messages": st.lists(_JSON, max_size=3)}))
def test_any_json_is_a_conversation_or_gets_a_sentence(value: Any) -> None:
    read = read_or_sentence(json.dumps(value).encode())
    if isinstance(read, str):
        assert read.endswith(".")
        assert "\n" not in read
    else:
        assert {"user", "assistant"} <= {message.role for message in read.messages}


def read_or_sentence(line: bytes) -> Conversation | str:
    """The conversation, or why there is none."""
    try:
        return parse_row(line, RULES)
    except RowError as error:
        return str(error)


@given(st.binary(max_size=40))
def test_any_bytes_get_a_sentence(line: bytes) -> None:
    with pytest.raises(RowError, match=r"\.$"):
        parse_row(line, RULES)
