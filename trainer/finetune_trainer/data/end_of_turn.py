"""Where an answer ends: read off what the prompt format writes after it, which is what the model learns to end with.

Declared formats and chat templates are rendered alike and nothing is parsed: a template is a program, and only its
output says how it ends the last answer, an earlier one, or one in a conversation with a system message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from finetune_api.answer_literals import TAG
from finetune_api.generation import GenerationConfig
from finetune_api.prompt_format import SHORTEST_STOP_TEXT, Message, RenderError
from finetune_trainer.data.conversation import RowError
from finetune_trainer.data.render import Renderer, make_renderer
from finetune_trainer.data.tokenizer import ModelTokenizer

_CONVERSATIONS = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)
"""Roles of the conversations that are rendered; a template refuses some of them."""

_ANSWERS = ("It is four", "No, 2 and 2 make 5")
"""Two answers that end differently, so that what their renderings end with in common is the format's."""


@dataclass(frozen=True)
class AnswerStops:
    """What ends an answer."""

    token_ids: list[int]
    texts: list[str]
    """Stops that are no token of their own."""
    by_text: bool
    """Whether there are answers that only the texts end."""


def answer_tails(renderer: Renderer) -> list[str]:
    """The different texts that follow an answer in training, that of a single question first.

    Empty where the format renders no conversation at all.
    """
    found: dict[str, None] = {}
    for roles in _CONVERSATIONS:
        try:
            one, other = (_trained_texts(renderer, roles, answer) for answer in _ANSWERS)
        except (RowError, RenderError):
            continue
        found |= dict.fromkeys(map(_common_end, one, other))
    return list(found)


def answer_stops(model: ModelTokenizer, generation: GenerationConfig) -> AnswerStops:
    """The declared stops and those that were found in rendered answers."""
    trained = [trained_stop(model, generation, tail) for tail in tails_of(model, generation)]
    ids, texts = list(generation.stopping_tokens), list[str]()
    for stop in (*generation.stopping_sequences, *trained):
        if isinstance(stop, str):
            found = model.ids(stop)
            special = len(found) == 1 and _is_special(model, found[0], stop)
            ids += found if special else []
            texts += [] if special else [stop]
        elif stop is not None:
            ids.append(stop)
    by_text = bool(texts) and (not ids or any(stop in texts for stop in trained))
    return AnswerStops(list(dict.fromkeys(ids)), list(dict.fromkeys(texts)), by_text)


def tails_of(model: ModelTokenizer, generation: GenerationConfig) -> list[str]:
    """`answer_tails` of a job's prompt format.

    Raises:
        JobError: InvalidSpec, the tokenizer's chat template is asked for and there is none.
    """
    if generation.prompt_format is None:
        return []
    return answer_tails(make_renderer(generation.prompt_format, model))


def trained_stop(model: ModelTokenizer, generation: GenerationConfig, tail: str) -> int | str | None:
    """What ends an answer that `tail` follows: a token id, else a text, or None where nothing does.

    Special tokens go before other added ones: in `</answer><|eot_id|>` the tag may be a token, too.
    """
    ids = model.ids(tail)
    added = model.tokenizer.added_tokens_decoder
    tokens = [token for token in ids if token in generation.stopping_tokens or _is_special(model, token, tail)]
    tokens.sort(key=lambda token: token in added and not added[token].special)
    if tokens:
        return tokens[0]
    declared = next((stop for stop in generation.stopping_sequences if stop in tail), None)
    if declared is not None:
        return declared
    tag = TAG.search(tail)
    if tag is not None:
        return tag[0]
    return tail.rstrip() if len(tail.strip()) >= SHORTEST_STOP_TEXT else None


def _is_special(model: ModelTokenizer, token: int, text: str) -> bool:
    """Whether `token`, one of `text`, stands for itself there: not for white space, nor for what is unknown."""
    added = model.tokenizer.added_tokens_decoder.get(token)
    if added is None:
        return bool(token == model.tokenizer.eos_token_id)
    return bool(added.content.strip()) and added.content in text


def _trained_texts(renderer: Renderer, roles: Sequence[str], answer: str) -> list[str]:
    messages = [Message(role, answer if role == "assistant" else f"A {role}'s text.") for role in roles]
    return [
        rendering.text[turn.prompt_end : turn.end]
        for rendering in renderer.render(messages)
        for turn in reversed(rendering.turns)
    ]


def _common_end(one: str, other: str) -> str:
    length = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    )
    return one[len(one) - length :]
