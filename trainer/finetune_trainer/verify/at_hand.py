"""The verdict on an adapter on this machine, from what was found of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_trainer.verify.answers import Judgement, Kind, judge_answers
from finetune_trainer.verify.compare import Answer, Likeness, logprob_distance, trained_answer
from finetune_trainer.verify.golden import GOLDEN, GoldenCase
from finetune_trainer.verify.prompts import PromptLikeness, first_difference
from finetune_trainer.verify.report import CaseResult, Check, Report, Status, one_line


def judge_at_hand(
    checks: Sequence[Check],
    cases: Sequence[GoldenCase],
    *,
    prompts: Sequence[str | None] = (),
    answers: Sequence[Answer] = (),
    base: Sequence[Answer] = (),
    base_model: str = "",
    notes: Sequence[str] = (),
) -> Report:
    """The verdict.

    Args:
        checks: what was found of files and tensors. After a fault in them nothing else was looked at.
        cases: the golden ones; none where the adapter has none.
        prompts: what its chat template makes of each case.
        answers: what it answers.
        base: what the base model alone answers.
        base_model: the base model's address.
        notes: sentences for the reader.
    """
    checks = list(checks)
    if any(check.status is Status.FAULT for check in checks) or not cases:
        return Report(_verified(checks), _message(checks, cases), checks, [], list(notes))
    judged = judge_answers(cases, answers, base=base)
    checks += [_prompt_check(cases, prompts), _answer_check(judged, base_model), _stop_check(judged)]
    results = [
        CaseResult(
            number=index + 1,
            prompt=PromptLikeness.SAME if prompts[index] == case.prompt else PromptLikeness.OTHER,
            answer=judged.trained[index].likeness,
            base=judged.base[index].likeness,
            expected=case.text,
            found=answers[index].text,
            logprob_difference=logprob_distance(answers[index], trained_answer(case)),
        )
        for index, case in enumerate(cases)
    ]
    return Report(_verified(checks), _message(checks, cases), checks, results, list(notes))


def _prompt_check(cases: Sequence[GoldenCase], prompts: Sequence[str | None]) -> Check:
    name = "prompts"
    wrong = [(case, found) for case, found in zip(cases, prompts, strict=True) if found != case.prompt]
    if not wrong:
        return Check(name, Status.OK, f"its template renders the {len(cases)} golden prompts")
    case, found = wrong[0]
    if found is None:
        return Check(name, Status.FAULT, f"its chat template refuses {len(wrong)} of {len(cases)} golden prompts")
    here, there = first_difference(found, case.prompt)
    return Check(
        name,
        Status.FAULT,
        f"its chat template renders {len(wrong)} of {len(cases)} prompts otherwise, {here!r} where training had "
        f"{there!r}",
    )


def _answer_check(judged: Judgement, base_model: str) -> Check:
    name = "answers"
    other = f"{judged.count(Likeness.OTHER)} of {judged.known} answers are not the trained ones"
    within = "" if judged.distance is None else f", log-probs within {judged.distance:.1g}"
    if judged.kind is Kind.TRAINED:
        return Check(name, Status.OK, f"on {base_model} it gives the {len(judged.trained)} trained answers{within}")
    if judged.kind is Kind.UNKNOWN:
        return Check(name, Status.UNKNOWN, "its answers and its base model's are too alike to tell them apart")
    sentence = {
        Kind.BASE: "it answers as its base model does: the adapter does nothing",
        Kind.WRONG_BASE: f"{other}, and {base_model} does not answer as the base model that was trained: give that "
        "one with --base-model",
        Kind.OTHER_ADAPTER: f"{other} while its base model is the right one: its weights or settings are another "
        "adapter's",
        Kind.OTHER_LOGPROBS: f"its answers have other probabilities than the trained ones{within}: its weights or "
        "settings are another adapter's, or the base model is another",
    }.get(judged.kind, other)
    return Check(name, Status.FAULT, sentence)


def _stop_check(judged: Judgement) -> Check:
    name = "stops"
    if judged.ran_on:
        return Check(
            name,
            Status.FAULT,
            f"{len(judged.ran_on)} of {judged.known} answers go on where training has ended them: its "
            "generation_config.json lacks the trained stop",
        )
    return Check(name, Status.OK, "")


def _verified(checks: Sequence[Check]) -> bool | None:
    states = {check.name: check.status for check in checks}
    if Status.FAULT in states.values():
        return False
    return True if states.get("answers") is Status.OK else None


def _message(checks: Sequence[Check], cases: Sequence[GoldenCase]) -> str:
    faults = [check.message for check in checks if check.status is Status.FAULT]
    if faults:
        return one_line(f"The adapter is not as trained: {'; also, '.join(faults)}.")
    told = "; ".join(check.message for check in checks if check.message)
    if not cases:
        return one_line(f"It has no {GOLDEN}, so its answers could not be compared: {told}.")
    if _verified(checks) is None:
        return one_line(f"It cannot be told whether the adapter is as trained: {told}.")
    return one_line(f"The adapter is as trained: {told}.")
