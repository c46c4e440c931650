"""What a set of answers says about the model that gave them: the trained one, its base, or neither. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetune_trainer.verify.compare import (
    Answer,
    Decode,
    Likeness,
    Match,
    base_answer,
    differ,
    logprob_distance,
    match,
    tolerance,
    trained_answer,
)
from finetune_trainer.verify.golden import GoldenCase

Answers = Sequence[Answer | None]
"""One per golden case; None where it was not asked."""

_ALIKE = (Likeness.SAME, Likeness.TIE)
_STEPS_APART = 4.0
"""Log-probs that differ by more than this many times what the base model's differ are another adapter's."""
_FAR = 2.0
"""Times the tolerance from which log-probs are another model's, whatever the precision."""
_FLOOR = 1 / 8
"""Share of the tolerance below which log-probs are never called different."""


class Kind(StrEnum):
    """Whose answers they are."""

    TRAINED = "trained"
    SAMPLING = "sampling"
    """The trained model's, changed by penalties that the server adds by itself."""
    BASE = "base"
    WRONG_BASE = "wrong-base"
    OTHER_ADAPTER = "other-adapter"
    NEITHER = "neither"
    """Neither the trained ones nor the base's, and nothing else is known of the base."""
    OTHER_LOGPROBS = "other-logprobs"
    """The trained tokens with other probabilities."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Judgement:
    """What was found."""

    kind: Kind
    trained: list[Match]
    """Of each answer, with the trained one."""
    base: list[Match]
    """Of each answer, with the base model's."""
    base_alike: bool | None
    """Whether the base model itself answers as it did in training; None where it was not asked."""
    distance: float | None
    """The largest difference of a log-prob to the trained one, where log-probs are known."""
    base_distance: float | None
    """The same of the base model's own answers."""

    def count(self, *kinds: Likeness) -> int:
        """Answers that relate to the trained ones in one of these ways."""
        return sum(found.likeness in kinds for found in self.trained)

    @property
    def known(self) -> int:
        """Prompts that were answered."""
        return len(self.trained) - self.count(Likeness.UNKNOWN)

    @property
    def ran_on(self) -> list[int]:
        """Indices of the answers that go on where training has ended them."""
        return [index for index, found in enumerate(self.trained) if found.ran_on]


def judge_answers(
    cases: Sequence[GoldenCase],
    answers: Answers,
    *,
    neutral: Answers = (),
    base: Answers = (),
    decode: Decode | None = None,
) -> Judgement:
    """Whose `answers` they are.

    Args:
        cases: the golden ones.
        answers: what is judged.
        neutral: the same prompts again, without penalties; empty where nobody asked.
        base: what the base model behind the adapter answers to them; empty where nobody asked.
        decode: text of token ids, for answers without ids.
    """
    trained = [match(answer, trained_answer(case), decode) for case, answer in zip(cases, answers, strict=True)]
    as_base = [match(answer, base_answer(case), decode) for case, answer in zip(cases, answers, strict=True)]
    of_base = [match(answer, base_answer(case), decode) for case, answer in zip(cases, base, strict=bool(base))]
    known = [found.likeness for found in of_base if found.likeness is not Likeness.UNKNOWN]
    distance = _largest(
        logprob_distance(answer, trained_answer(case)) for case, answer in zip(cases, answers, strict=True)
    )
    base_distance = _largest(
        logprob_distance(answer, base_answer(case)) for case, answer in zip(cases, base, strict=bool(base))
    )
    # A base model may repeat what another would, and be told by its probabilities alone.
    far = base_distance is not None and base_distance > _FAR * max(map(tolerance, cases))
    base_alike = Likeness.OTHER not in known and not far if known else None
    wrong = [index for index, found in enumerate(trained) if found.likeness is Likeness.OTHER]
    if all(found.likeness is Likeness.UNKNOWN for found in trained):
        kind = Kind.UNKNOWN
    elif not wrong:
        kind = _alike(cases, answers, trained, as_base, distance, base_distance)
    elif _mended(cases, wrong, neutral, decode):
        kind = Kind.SAMPLING
    elif _as_base(cases, answers, base, as_base):
        kind = Kind.BASE
    elif base_alike is None:
        kind = Kind.NEITHER
    else:
        kind = Kind.OTHER_ADAPTER if base_alike else Kind.WRONG_BASE
    return Judgement(kind, trained, as_base, base_alike, distance, base_distance)


def _alike(
    cases: Sequence[GoldenCase],
    answers: Answers,
    trained: Sequence[Match],
    as_base: Sequence[Match],
    distance: float | None,
    base_distance: float | None,
) -> Kind:
    """No token speaks against the trained model; is it more than the base model, and its very probabilities?"""
    shown = any(
        one.likeness in _ALIKE and other.likeness is Likeness.OTHER for one, other in zip(trained, as_base, strict=True)
    )
    if not shown:
        nearer = _nearer(cases, answers)
        if nearer is not Kind.TRAINED:
            return nearer
    if distance is None:
        return Kind.TRAINED
    widest = max(tolerance(case) for case in cases)
    allowed = _FAR * widest if base_distance is None else max(_STEPS_APART * base_distance, _FLOOR * widest)
    return Kind.TRAINED if distance <= allowed else Kind.OTHER_LOGPROBS


def _nearer(cases: Sequence[GoldenCase], answers: Answers) -> Kind:
    """Whether log-probs are those of the trained model or of its base, for answers that both would give."""
    to_trained = to_base = 0.0
    for case, answer in zip(cases, answers, strict=True):
        one, other = logprob_distance(answer, trained_answer(case)), logprob_distance(answer, base_answer(case))
        if one is not None and other is not None:
            to_trained, to_base = to_trained + one, to_base + other
    if 2 * to_trained < to_base:
        return Kind.TRAINED
    return Kind.BASE if 2 * to_base < to_trained else Kind.UNKNOWN


def _mended(cases: Sequence[GoldenCase], wrong: Sequence[int], neutral: Answers, decode: Decode | None) -> bool:
    """Whether the wrong answers are the trained ones without penalties."""
    again = [
        match(neutral[index], trained_answer(cases[index]), decode).likeness
        for index in wrong
        if index < len(neutral) and neutral[index] is not None
    ]
    return bool(again) and all(likeness in _ALIKE for likeness in again)


def _as_base(cases: Sequence[GoldenCase], answers: Answers, base: Answers, as_base: Sequence[Match]) -> bool:
    """Whether the answers are the base model's, where it would answer otherwise than the adapter."""
    telling = [
        found
        for case, found in zip(cases, as_base, strict=True)
        if found.likeness is not Likeness.UNKNOWN and differ(case)
    ]
    begun = any(found.at is None or found.at > 0 for found in telling)
    if begun and all(found.likeness in _ALIKE for found in telling):
        return True
    # The base model behind the server may be another one than training's, and the adapter still do nothing.
    pairs = [
        (answer.ids, alone.ids)
        for answer, alone in zip(answers, base, strict=bool(base))
        if answer is not None and alone is not None and answer.ids and alone.ids
    ]
    return bool(pairs) and all(
        one[: min(len(one), len(other))] == other[: min(len(one), len(other))] for one, other in pairs
    )


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
