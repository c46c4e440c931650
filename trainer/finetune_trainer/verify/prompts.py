"""Whether a server makes of a conversation the prompt that the model was trained on, or what is wrong with it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from finetune_trainer.verify.compare import Answer, Decode, common_beginning
from finetune_trainer.verify.golden import GoldenCase
from finetune_trainer.verify.report import Check, Status

TEMPLATE_CURE = "start the server with --chat-template and the adapter's chat_template.jinja"


class PromptLikeness(StrEnum):
    """How the prompt that a server made relates to the trained one."""

    SAME = "same"
    DOUBLED_BOS = "doubled-bos"
    MISSING_BOS = "missing-bos"
    OTHER = "other"
    UNKNOWN = "unknown"


def match_prompt(answer: Answer | None, case: GoldenCase) -> PromptLikeness:
    """The prompt behind `answer` beside the trained one, by ids or, where they are not reported, by their number."""
    if answer is None or answer.error is not None:
        return PromptLikeness.UNKNOWN
    trained = case.prompt_ids
    if answer.prompt_ids is not None:
        found = answer.prompt_ids
        if found == trained:
            return PromptLikeness.SAME
        if found[1:] == trained:
            return PromptLikeness.DOUBLED_BOS
        return PromptLikeness.MISSING_BOS if found == trained[1:] else PromptLikeness.OTHER
    if answer.prompt_tokens is None:
        return PromptLikeness.UNKNOWN
    return PromptLikeness.SAME if answer.prompt_tokens == len(trained) else PromptLikeness.OTHER


def first_difference(found: str, trained: str) -> tuple[str, str]:
    """What two texts have where they first differ, a few words each."""
    at = common_beginning(found, trained)
    start = max(0, at - 16)
    return found[start : at + 32], trained[start : at + 32]


def check_prompts(
    answers: Sequence[Answer],
    cases: Sequence[GoldenCase],
    prompts: Sequence[PromptLikeness],
    decode: Decode,
    *,
    plain_prompt_ids: list[int] | None,
) -> Check:
    """Whether a server makes the trained prompts.

    Args:
        answers: one per case.
        cases: the golden ones.
        prompts: `match_prompt` of each.
        decode: text of token ids, special tokens and all.
        plain_prompt_ids: what the server makes of the first prompt's own text; None where it does not say.
    """
    name = "prompts"
    known = [found for found in prompts if found is not PromptLikeness.UNKNOWN]
    if not known:
        return Check(name, Status.UNKNOWN, "the server does not say what prompts it makes")
    wrong = [index for index, found in enumerate(prompts) if found not in (PromptLikeness.SAME, PromptLikeness.UNKNOWN)]
    if not wrong:
        by_number = "" if any(answer.prompt_ids is not None for answer in answers) else " in length"
        return Check(name, Status.OK, f"{len(known)} of {len(cases)} prompts are the trained ones{by_number}")
    first = wrong[0]
    found, trained = answers[first], cases[first].prompt_ids
    if found.prompt_ids is None:
        return Check(name, Status.FAULT, _by_number(answers, cases, wrong))
    kinds = {prompts[index] for index in wrong}
    bos = repr(decode(trained[:1]))
    if kinds == {PromptLikeness.DOUBLED_BOS} and found.prompt_ids[:1] == trained[:1]:
        sentence = (
            f"{bos} stands twice at the beginning of its prompts (a doubled BOS): let the template write it and the "
            f"server add none, {TEMPLATE_CURE}"
        )
    elif kinds == {PromptLikeness.DOUBLED_BOS}:
        sentence = (
            f"its prompts begin with a BOS {decode(found.prompt_ids[:1])!r} that training had not: {TEMPLATE_CURE}"
        )
    elif kinds == {PromptLikeness.MISSING_BOS}:
        sentence = f"its prompts lack the BOS {bos} that training had: {TEMPLATE_CURE}"
    elif plain_prompt_ids is not None and plain_prompt_ids != cases[0].prompt_ids:
        sentence = "it makes other tokens of the same text, so its tokenizer is another base model's"
    else:
        here, there = first_difference(decode(found.prompt_ids), decode(trained))
        sentence = (
            f"{len(wrong)} of {len(known)} prompts are not the trained ones, they have {here!r} where training had "
            f"{there!r} (another chat template): {TEMPLATE_CURE}"
        )
    return Check(name, Status.FAULT, sentence)


def only_fewer(answers: Sequence[Answer], cases: Sequence[GoldenCase], prompts: Sequence[PromptLikeness]) -> bool:
    """Whether prompts are known by their number of tokens only, and those that differ have fewer by more than a BOS."""
    more = [
        (answer.prompt_tokens or 0) - len(case.prompt_ids)
        for answer, case, found in zip(answers, cases, prompts, strict=True)
        if found is PromptLikeness.OTHER
    ]
    by_ids = any(answer.prompt_ids is not None for answer in answers)
    return bool(more) and not by_ids and max(more) < -1


def _by_number(answers: Sequence[Answer], cases: Sequence[GoldenCase], wrong: Sequence[int]) -> str:
    more = {(answers[index].prompt_tokens or 0) - len(cases[index].prompt_ids) for index in wrong}
    if more == {1}:
        return f"each prompt has one token more than in training, as with a doubled BOS: {TEMPLATE_CURE}"
    if more == {-1}:
        return f"each prompt has one token less than in training, as without its BOS: {TEMPLATE_CURE}"
    found, trained = answers[wrong[0]].prompt_tokens, len(cases[wrong[0]].prompt_ids)
    return (
        f"{len(wrong)} of {len(cases)} prompts are not the trained ones, number {wrong[0] + 1} has {found} tokens "
        f"where training had {trained} (another chat template): {TEMPLATE_CURE}"
    )
