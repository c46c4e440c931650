"""Conversations to measure with: four shapes of data, made from word lists by a seeded generator.

What a trainer's speed depends on is how long rows are, how unequal, what they share and how much of them is
supervised. Lengths are therefore counted in the model's own tokens; the words mean nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""{"messages": [{"role", "content"}, ...]}, a line of a training file."""

POLICY_TOKENS = 1100
GUARDED_TOKENS = (100, 250)
VERDICTS = ("safe", "unsafe S1", "unsafe S4", "unsafe\nS7")
"""2 to 5 tokens each, the end of the turn included."""

TOOL_PROMPTS = 5
TOOL_PROMPT_TOKENS = 600

CHAT_TOKENS = (40, 800)
CHAT_MEDIAN_TOKENS = 180
CHAT_SIGMA = 0.8
"""Standard deviation of the logarithm of a chat's tokens."""

SHORT_TOKENS = (20, 90)

_SUBJECTS = "the clerk|our team|a reader|the older machine|each customer|that report|my neighbour|the second train"
_VERBS = "checks|sends|remembers|replaces|measures|describes|orders|opens|compares|follows|returns|writes"
_OBJECTS = "a letter|the invoice|every number|the garden|an early draft|two tickets|the wrong key|some coffee|a map"
_ENDINGS = "before noon|without asking|in the first week|near the river|as agreed|once again|by hand|for a friend"
_NAMES = "lookup|convert|reserve|cancel|estimate|translate|archive|notify|schedule|refund"


@dataclass(frozen=True)
class Words:
    """Text of a wanted number of tokens.

    Args:
        tokenizer: a fast tokenizer, which says where each token of a text ends.
        random: where all choices come from.
    """

    tokenizer: Any
    random: random.Random

    def text(self, tokens: int) -> str:
        """Sentences of `tokens` tokens; where a cut falls inside a word one token more or less may come out."""
        # A sentence has more than five tokens, so this is always enough to cut from.
        draft = " ".join(self._sentence() for _ in range(tokens // 5 + 1))
        ends = self.tokenizer(draft, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return draft[: ends[tokens - 1][1]].strip()

    def between(self, bounds: tuple[int, int]) -> str:
        """Text whose number of tokens is drawn evenly from `bounds`, both included."""
        return self.text(self.random.randint(*bounds))

    def call(self) -> str:
        """What a model writes to call a tool."""
        name, key = self._one(_NAMES), self._one(_NAMES)
        return f'{{"tool": "{name}_{key}", "arguments": {{"{key}": "{self.between((5, 20))}"}}}}'

    def _sentence(self) -> str:
        parts = [self._one(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)]
        return " ".join(parts).capitalize() + "."

    def _one(self, words: str) -> str:
        return self.random.choice(words.split("|"))


def guard(words: Words, count: int) -> list[Row]:
    """One long policy in all rows, a message to judge, an answer of a few tokens."""
    policy = words.text(POLICY_TOKENS)
    return [_row(policy, [(words.between(GUARDED_TOKENS), words.random.choice(VERDICTS))]) for _ in range(count)]


def tools(words: Words, count: int) -> list[Row]:
    """One of five descriptions of tools, and two to four turns of calls and results."""
    prompts = [words.text(TOOL_PROMPT_TOKENS) for _ in range(TOOL_PROMPTS)]
    return [_row(words.random.choice(prompts), _calls(words)) for _ in range(count)]


def chat(words: Words, count: int) -> list[Row]:
    """Several turns of log-normally distributed length; nothing is shared but a line."""
    return [_row("You are a helpful assistant.", _turns(words, _chat_tokens(words.random))) for _ in range(count)]


def short(words: Words, count: int) -> list[Row]:
    """One short question and its answer."""
    found = []
    for _ in range(count):
        tokens = words.random.randint(*SHORT_TOKENS)
        asked = max(1, round(tokens * words.random.uniform(0.3, 0.7)))
        found.append(_row("Answer briefly.", [(words.text(asked), words.text(tokens - asked))]))
    return found


SHAPES: Mapping[str, Callable[[Words, int], list[Row]]] = {"guard": guard, "tools": tools, "chat": chat, "short": short}


def rows_of(shape: str, tokenizer: Any, *, count: int, seed: int) -> list[Row]:
    """`count` rows of a shape; the same for the same arguments, on every machine."""
    # A generator seeded by a string does not depend on the process, as hash() would.
    return SHAPES[shape](Words(tokenizer, random.Random(f"{shape}-{seed}")), count)


def _calls(words: Words) -> list[tuple[str, str]]:
    turns = [(words.between((15, 60)), words.call())]
    for _ in range(words.random.randint(1, 3)):
        answers = (words.call(), words.between((15, 60)))
        turns += [(f"Result: {words.between((30, 120))}", words.random.choice(answers))]
    return turns


def _chat_tokens(source: random.Random) -> int:
    drawn = source.lognormvariate(math.log(CHAT_MEDIAN_TOKENS), CHAT_SIGMA)
    return min(max(round(drawn), CHAT_TOKENS[0]), CHAT_TOKENS[1])


def _turns(words: Words, tokens: int) -> list[tuple[str, str]]:
    """Turns of `tokens` tokens together, the longer the row the more of them."""
    number = min(6, 1 + tokens // 120)
    turns = []
    for turn in range(number):
        size = tokens // number + (turn < tokens % number)
        asked = max(1, round(size * words.random.uniform(0.2, 0.5)))
        turns.append((words.text(asked), words.text(size - asked)))
    return turns


def _row(system: str, turns: Sequence[tuple[str, str]]) -> Row:
    messages = [{"role": "system", "content": system}]
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages}
