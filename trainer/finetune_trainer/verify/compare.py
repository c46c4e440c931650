"""Whether an answer is the one that was recorded: token by token, up to where rounding may decide otherwise. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile

from finetune_trainer.verify.golden import GoldenCase

Decode = Callable[[Sequence[int]], str]
"""Text of token ids as clients see it, special tokens left out."""

_ROUNDING = 3 * 2.0**-8
"""Share of the largest logit by which two computations of the same may differ, when either is in bfloat16."""


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt. What a server does not report is None."""

    text: str = ""
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    ended: bool | None = None
    """Whether the answer came to its end, instead of being cut off."""
    tokens: int | None = None
    """How many were generated."""
    prompt_ids: list[int] | None = None
    prompt_tokens: int | None = None
    error: str | None = None
    """Why there is no answer: the server's own sentence."""


@dataclass(frozen=True)
class Reference:
    """An answer of golden.jsonl."""

    ids: list[int]
    margins: list[float]
    logprobs: list[float]
    text: str
    ended: bool
    tolerance: float
    """In nats."""


class Likeness(StrEnum):
    """How an answer relates to a reference."""

    SAME = "same"
    TIE = "tie"
    """The same up to a token that was hardly better than the next: rounding may have decided."""
    OTHER = "other"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Match:
    """An answer beside a reference."""

    likeness: Likeness
    at: int | None = None
    """Index of the first token that differs."""
    ran_on: bool = False
    """The answer goes on where the reference has ended."""


def tolerance(case: GoldenCase) -> float:
    """Nats that two tokens may be apart and still change places by rounding; see `_ROUNDING`."""
    return _ROUNDING * case.scale


def trained_answer(case: GoldenCase) -> Reference:
    """What the adapter answered."""
    ended = case.finish == "stop"
    return Reference(case.ids, case.margins, case.logprobs, case.text, ended, tolerance(case))


def base_answer(case: GoldenCase) -> Reference:
    """How the base model began."""
    ended = case.base_ids[-1] in case.stop_token_ids
    return Reference(case.base_ids, case.base_margins, case.base_logprobs, case.base_text, ended, tolerance(case))


def differ(case: GoldenCase) -> bool:
    """Whether adapter and base model answer so differently that rounding cannot explain it."""
    as_base = match(Answer(ids=case.ids, text=case.text), base_answer(case))
    as_trained = match(Answer(ids=case.base_ids, text=case.base_text, ended=False), trained_answer(case))
    return Likeness.OTHER in (as_base.likeness, as_trained.likeness)


def match(answer: Answer | None, reference: Reference, decode: Decode | None = None) -> Match:
    """How `answer` relates to `reference`.

    Args:
        answer: None or with an error where there is none.
        reference: a whole answer, or the beginning of one.
        decode: finds the token at which texts part, for answers without ids.
    """
    if answer is None or answer.error is not None:
        return Match(Likeness.UNKNOWN)
    if answer.ids is None:
        return _match_texts(answer, reference, decode)
    ids = answer.ids
    at = common_beginning(ids, reference.ids)
    if at == len(reference.ids):
        return Match(Likeness.SAME, ran_on=reference.ended and len(ids) > at)
    if at < len(ids):
        return _parted(at, reference)
    # Some servers keep the token that ended the answer to themselves.
    whole = at == len(reference.ids) - 1 and reference.ended
    if answer.ended is False or (answer.ended and whole):
        return Match(Likeness.SAME if at else Likeness.UNKNOWN)
    return _parted(at, reference)


def _match_texts(answer: Answer, reference: Reference, decode: Decode | None) -> Match:
    text, expected = answer.text.strip(), reference.text.strip()
    if text == expected:
        # Tokens that are not shown may follow the end.
        more = answer.tokens is not None and answer.tokens > len(reference.ids)
        return Match(Likeness.SAME, ran_on=reference.ended and answer.ended is False and more)
    if text.startswith(expected) and (expected or not reference.ended):
        return Match(Likeness.SAME if expected else Likeness.UNKNOWN, ran_on=reference.ended)
    if answer.ended is False and text and expected.startswith(text):
        return Match(Likeness.SAME)
    if decode is None:
        return Match(Likeness.OTHER)
    characters = common_beginning(text, expected)
    lengths = [len(decode(reference.ids[: count + 1]).lstrip()) for count in range(len(reference.ids))]
    at = next((index for index, length in enumerate(lengths) if length > characters), len(lengths) - 1)
    return _parted(at, reference)


def _parted(at: int, reference: Reference) -> Match:
    close = reference.margins[at] <= reference.tolerance
    return Match(Likeness.TIE if close else Likeness.OTHER, at)


def common_beginning(some: Sequence[object], others: Sequence[object]) -> int:
    """Length of what both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))


def logprob_distance(answer: Answer | None, reference: Reference) -> float | None:
    """The largest difference of a log-prob among the first tokens that are the same; None where there is none."""
    if answer is None or answer.ids is None or not answer.logprobs:
        return None
    count = common_beginning(answer.ids, reference.ids)
    pairs = list(zip(answer.logprobs[:count], reference.logprobs, strict=False))
    return max((abs(found - expected) for found, expected in pairs), default=None)
