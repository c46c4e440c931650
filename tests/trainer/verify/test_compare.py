"""An answer is compared token by token, up to where rounding may decide otherwise."""

from __future__ import annotations

import pytest

from finetune_trainer.verify.compare import (
    Answer,
    Likeness,
    Match,
    Reference,
    differ,
    match,
    tolerance,
)
from finetune_trainer.verify.prompts import PromptLikeness, match_prompt
from tests.trainer.verify.canned import BOS, EOS, case, text, tokenizer

TRAINED = Reference([10, 60, 70, EOS], [4.0, 0.1, 4.0, 4.0], [-0.1] * 4, "w10 w60 w70", ended=True, tolerance=0.2)
BEGUN = Reference([10, 30, 31], [4.0, 4.0, 4.0], [-0.1] * 3, "w10 w30 w31", ended=False, tolerance=0.2)
SAME, TIE, OTHER, UNKNOWN = Likeness.SAME, Likeness.TIE, Likeness.OTHER, Likeness.UNKNOWN


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (Answer(ids=[10, 60, 70, EOS]), TRAINED, Match(SAME)),
        (Answer(ids=[10, 60, 70, EOS, 5]), TRAINED, Match(SAME, ran_on=True)),
        # The stop is left out by some servers.
        (Answer(ids=[10, 60, 70], ended=True), TRAINED, Match(SAME)),
        (Answer(ids=[10, 60], ended=True), TRAINED, Match(OTHER, 2)),
        (Answer(ids=[10, 60], ended=False), TRAINED, Match(SAME)),
        (Answer(ids=[10, 61, 70, EOS]), TRAINED, Match(TIE, 1)),
        (Answer(ids=[10, 60, 71, EOS]), TRAINED, Match(OTHER, 2)),
        (Answer(ids=[10, 30, 31, 99, 98]), BEGUN, Match(SAME)),
        (Answer(ids=[10, 32]), BEGUN, Match(OTHER, 1)),
        (Answer(error="busy"), TRAINED, Match(UNKNOWN)),
        (None, TRAINED, Match(UNKNOWN)),
        (Answer("w10 w60 w70", ended=True, tokens=4), TRAINED, Match(SAME)),
        (Answer(" w10 w60 w70\n", ended=True), TRAINED, Match(SAME)),
        (Answer("w10 w60 w70", ended=False, tokens=20), TRAINED, Match(SAME, ran_on=True)),
        (Answer("w10 w60 w70 w5", ended=False), TRAINED, Match(SAME, ran_on=True)),
        (Answer("w10 w61 w70", ended=True), TRAINED, Match(TIE, 1)),
        (Answer("w10 w60 w71", ended=True), TRAINED, Match(OTHER, 2)),
        (Answer("w10 w30 w31 w99"), BEGUN, Match(SAME)),
        (Answer(""), BEGUN, Match(OTHER, 0)),
    ],
)
def test_an_answer_beside_a_reference(answer: Answer | None, reference: Reference, expected: Match) -> None:
    decode = tokenizer().decode
    assert match(answer, reference, lambda ids: decode(list(ids))) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Answer(prompt_ids=[BOS, 10, 2]), PromptLikeness.SAME),
        (Answer(prompt_ids=[BOS, BOS, 10, 2]), PromptLikeness.DOUBLED_BOS),
        (Answer(prompt_ids=[10, 2]), PromptLikeness.MISSING_BOS),
        (Answer(prompt_ids=[BOS, 10, 3]), PromptLikeness.OTHER),
        (Answer(prompt_tokens=3), PromptLikeness.SAME),
        (Answer(prompt_tokens=4), PromptLikeness.OTHER),
        (Answer(), PromptLikeness.UNKNOWN),
    ],
)
def test_a_prompt_beside_the_trained_one(found: Answer, expected: PromptLikeness) -> None:
    assert match_prompt(found, case(0)) is expected


def test_rounding_is_relative_to_the_logits() -> None:
    """Logits of 20 in bfloat16 are a sixteenth apart; a random model's are a hundred times smaller."""
    assert 0.1 < tolerance(case(0, scale=20.0)) < 0.5
    assert tolerance(case(0, scale=0.5)) < 0.01


def test_adapter_and_base_differ_only_where_rounding_cannot_explain_it() -> None:
    assert differ(case(0))
    close = [4.0, 0.01, 4.0, 4.0]
    assert not differ(case(0, margins=close, base_margins=[2.0, 0.01, 2.0, 2.0, 2.0, 2.0]))
    ids, margins = [10, 60, 70, 50], [4.0] * 4
    assert not differ(
        case(0, ids=ids, base_ids=ids, text=text(ids), base_text=text(ids), base_margins=margins, base_logprobs=[-0.5])
    )
