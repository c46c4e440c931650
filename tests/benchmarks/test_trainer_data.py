"""The benchmark's data: the same every time, and as long in tokens as it claims."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.trainer.shapes import (
    CHAT_TOKENS,
    GUARDED_TOKENS,
    POLICY_TOKENS,
    SHAPES,
    SHORT_TOKENS,
    TOOL_PROMPT_TOKENS,
    TOOL_PROMPTS,
    VERDICTS,
    Row,
    rows_of,
)
from tests.models import smollm2_folder

ROWS = 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder())


def _tokens(tokenizer: Any, row: Row) -> list[int]:
    return [len(tokenizer(message["content"])["input_ids"]) for message in row["messages"]]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(shape: str, tokenizer: Any) -> None:
    first = rows_of(shape, tokenizer, count=ROWS, seed=1)

    assert rows_of(shape, tokenizer, count=ROWS, seed=1) == first
    assert rows_of(shape, tokenizer, count=ROWS, seed=2) != first
    assert len({json.dumps(row) for row in first}) == ROWS


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_begin_with_a_system_message_and_end_with_the_assistant(shape: str, tokenizer: Any) -> None:
    for row in rows_of(shape, tokenizer, count=ROWS, seed=0):
        roles = [message["role"] for message in row["messages"]]
        assert roles[0] == "system"
        assert roles[-1] == "assistant"
        assert all(one != other for one, other in pairwise(roles))
        assert all(message["content"].strip() for message in row["messages"])


def test_guard_shares_one_policy_and_answers_in_a_few_tokens(tokenizer: Any) -> None:
    rows = rows_of("guard", tokenizer, count=ROWS, seed=0)

    assert len({row["messages"][0]["content"] for row in rows}) == 1
    for row in rows:
        policy, message, _ = _tokens(tokenizer, row)
        assert policy == pytest.approx(POLICY_TOKENS, abs=1)
        assert GUARDED_TOKENS[0] - 1 <= message <= GUARDED_TOKENS[1] + 1
    assert all(2 <= len(tokenizer(f"{verdict}<|im_end|>")["input_ids"]) <= 6 for verdict in VERDICTS)


def test_tools_share_five_prompts(tokenizer: Any) -> None:
    rows = rows_of("tools", tokenizer, count=ROWS, seed=0)

    assert len({row["messages"][0]["content"] for row in rows}) == TOOL_PROMPTS
    for row in rows:
        assert _tokens(tokenizer, row)[0] == pytest.approx(TOOL_PROMPT_TOKENS, abs=1)
        assert len(row["messages"]) >= 5


@pytest.mark.parametrize(("shape", "bounds"), [("chat", CHAT_TOKENS), ("short", SHORT_TOKENS)])
def test_lengths_stay_within_their_bounds_and_differ(shape: str, bounds: tuple[int, int], tokenizer: Any) -> None:
    rows = rows_of(shape, tokenizer, count=ROWS, seed=0)

    lengths = [sum(_tokens(tokenizer, row)[1:]) for row in rows]
    # A cut inside a word may give or take a token in each message.
    slack = max(len(row["messages"]) for row in rows)
    assert min(lengths) >= bounds[0] - slack
    assert max(lengths) <= bounds[1] + slack
    assert max(lengths) > 2 * min(lengths)
