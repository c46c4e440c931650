"""The verdict on a server, from what it answered. Pure: whoever asks it is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune_trainer.verify.answers import Judgement, Kind, judge_answers
from finetune_trainer.verify.compare import Answer, Decode, Likeness, logprob_distance, trained_answer
from finetune_trainer.verify.golden import GoldenCase
from finetune_trainer.verify.prompts import TEMPLATE_CURE, PromptLikeness, check_prompts, match_prompt, only_fewer
from finetune_trainer.verify.report import CaseResult, Check, Report, Status, one_line

STOP_CURE = "start the server with --generation-config and the adapter's folder, or send stop_token_ids"


@dataclass
class Asked:
    """What a server answered to one golden case; None where it was not asked."""

    chat: Answer
    """To the messages."""
    neutral: Answer | None = None
    """To the messages, without penalties."""
    direct: Answer | None = None
    """To the trained prompt's own token ids."""
    base: Answer | None = None
    """The base model's, to the same ids."""


@dataclass
class Served:
    """All that was observed of a server."""

    model: str
    listed: list[str] | None
    """Models it says it has; None where it does not say."""
    base_name: str | None = None
    """Under which name it serves the adapter's base model."""
    asked: list[Asked] = field(default_factory=list)
    text_prompt_ids: list[int] | None = None
    """Tokens it makes of the first golden prompt as plain text, by default."""
    plain_prompt_ids: list[int] | None = None
    """The same when it is asked to add none of its own."""


def judge(served: Served, cases: Sequence[GoldenCase], decode: Decode, *, base_model: str | None) -> Report:
    """The verdict.

    Args:
        served: what was observed, an `Asked` per case where the model is listed.
        cases: the golden ones.
        decode: text of token ids, special tokens and all.
        base_model: the adapter's, by the name it was trained under.
    """
    if served.listed is not None and served.model not in served.listed:
        return _not_listed(served)
    requests = _request_check(served)
    if all(asked.chat.error is not None for asked in served.asked):
        return Report(False, f"{_negative(served)}: {requests.message}.", [requests])
    prompts = [match_prompt(asked.chat, case) for asked, case in zip(served.asked, cases, strict=True)]
    prompt = check_prompts(
        [asked.chat for asked in served.asked], cases, prompts, decode, plain_prompt_ids=served.plain_prompt_ids
    )
    by_ids = any(asked.chat.prompt_ids is not None for asked in served.asked)
    direct = prompt.status is Status.FAULT and by_ids and any(asked.direct is not None for asked in served.asked)
    answers = [asked.direct if direct else asked.chat for asked in served.asked]
    judged = judge_answers(
        cases,
        answers,
        neutral=[] if direct else [asked.neutral for asked in served.asked],
        base=[asked.base for asked in served.asked] if served.base_name else [],
        decode=decode,
    )
    if judged.kind is Kind.TRAINED and only_fewer([asked.chat for asked in served.asked], cases, prompts):
        prompt = Check(
            "prompts",
            Status.UNKNOWN,
            "it counts fewer tokens in prompts than training had, as servers do that leave out what they had cached",
        )
    # A wrong prompt explains any answer.
    blind = prompt.status is Status.FAULT and not direct
    answer = Check("answers", Status.UNKNOWN, "") if blind else _answer_check(judged, base_model)
    stop = _stop_check(cases, judged, decode)
    checks = [requests, prompt, answer, stop]
    return Report(
        verified=_verified(checks),
        message=_message(served, checks, judged, direct=direct),
        checks=[check for check in checks if check.message],
        cases=_results(cases, served.asked, prompts, answers, judged),
        notes=_notes(served, cases, judged, decode),
    )


def _not_listed(served: Served) -> Report:
    names = [one_line(name)[:80] for name in served.listed or []]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} others" if len(names) > 8 else "")
    sentence = f"the server has no model {served.model}: it has {shown or 'none'}"
    check = Check("listed", Status.FAULT, sentence)
    return Report(False, f"{_negative(served)}: {sentence}.", [check])


def _request_check(served: Served) -> Check:
    errors = [asked.chat.error for asked in served.asked if asked.chat.error is not None]
    if not errors:
        return Check("requests", Status.OK, "")
    cure = f"; {TEMPLATE_CURE}" if "template" in errors[0].lower() else ""
    share = "the golden prompts" if len(errors) == len(served.asked) else f"{len(errors)} golden prompts"
    return Check("requests", Status.FAULT, f"it refuses {share} ({one_line(errors[0])[:300].rstrip('.')}){cure}")


def _answer_check(judged: Judgement, base_model: str | None) -> Check:
    name = "answers"
    other = f"{judged.count(Likeness.OTHER)} of {judged.known} answers are not the trained ones"
    base = base_model or "the adapter's base model"
    if judged.kind is Kind.TRAINED:
        return Check(name, Status.OK, _same_answers(judged))
    if judged.kind is Kind.UNKNOWN:
        return Check(
            name,
            Status.UNKNOWN,
            "the adapter's answers and its base model's are too alike to tell which the server gives",
        )
    sentence = {
        Kind.SAMPLING: f"{other}, and without penalties they are: take repetition_penalty and the like out of the "
        "generation config that the server was started with",
        Kind.BASE: "it answers as the base model does, so the adapter does nothing there: see that the server has "
        "loaded it and that this name stands for it"
        + (f"; nor is that base model {base}" if judged.base_alike is False else ""),
        Kind.WRONG_BASE: f"{other}, and its base model answers otherwise than the one that was trained: serve the "
        f"adapter on {base}, in its precision",
        Kind.OTHER_ADAPTER: f"{other} while its base model is the right one: it has another adapter, or another step "
        "of this one",
        Kind.NEITHER: f"{other}, nor the base model's: it has another base model than {base}, another adapter, or "
        "another step of this one",
        Kind.OTHER_LOGPROBS: "its answers are the trained ones with other probabilities (log-probs differ by up to "
        f"{judged.distance or 0:.2g}): another step of this adapter, another strength, or a quantized base model",
    }[judged.kind]
    return Check(name, Status.FAULT, sentence)


def _same_answers(judged: Judgement) -> str:
    ties = judged.count(Likeness.TIE)
    text = f"{judged.known} of {len(judged.trained)} answers are the trained ones"
    if ties:
        text += f" ({ties} of them up to a token that was as good as the next one)"
    return text if judged.distance is None else f"{text}, log-probs within {judged.distance:.1g}"


def _stop_check(cases: Sequence[GoldenCase], judged: Judgement, decode: Decode) -> Check:
    name = "stops"
    if judged.ran_on:
        case = cases[judged.ran_on[0]]
        stop = case.stop_texts[0] if case.stop_texts else decode(case.ids[-1:])
        return Check(
            name,
            Status.FAULT,
            f"{len(judged.ran_on)} of {judged.known} answers go on after {stop!r}, where training has ended them: "
            f"{STOP_CURE}",
        )
    ended = [
        case.finish == "stop" and found.likeness is Likeness.SAME
        for case, found in zip(cases, judged.trained, strict=True)
    ]
    if any(ended):
        return Check(name, Status.OK, f"{sum(ended)} answers end where training has ended them")
    return Check(name, Status.UNKNOWN, "")


def _verified(checks: Sequence[Check]) -> bool | None:
    states = {check.name: check.status for check in checks}
    if Status.FAULT in states.values():
        return False
    return True if states["answers"] is Status.OK else None


def _message(served: Served, checks: Sequence[Check], judged: Judgement, *, direct: bool) -> str:
    faults = [check.message for check in checks if check.status is Status.FAULT]
    if faults:
        aside = (
            "; given the trained prompt itself it answers as trained" if direct and judged.kind is Kind.TRAINED else ""
        )
        return one_line(f"{_negative(served)}: {'; also, '.join(faults)}{aside}.")
    told = "; ".join(check.message for check in checks if check.message)
    if _verified(checks) is None:
        return one_line(f"It cannot be told whether {served.model} serves the adapter as trained: {told}.")
    return one_line(f"{served.model} serves the adapter as trained: {told}.")


def _negative(served: Served) -> str:
    return f"{one_line(served.model)} does not serve the adapter as trained"


def _results(
    cases: Sequence[GoldenCase],
    asked: Sequence[Asked],
    prompts: Sequence[PromptLikeness],
    answers: Sequence[Answer | None],
    judged: Judgement,
) -> list[CaseResult]:
    return [
        CaseResult(
            number=index + 1,
            prompt=prompts[index],
            answer=judged.trained[index].likeness,
            base=judged.base[index].likeness,
            expected=case.text,
            found=_found(answers[index], asked[index].chat),
            logprob_difference=logprob_distance(answers[index], trained_answer(case)),
            error=asked[index].chat.error,
        )
        for index, case in enumerate(cases)
    ]


def _found(judged: Answer | None, chat: Answer) -> str | None:
    answer = judged or chat
    return None if answer.error is not None else answer.text


def _notes(served: Served, cases: Sequence[GoldenCase], judged: Judgement, decode: Decode) -> list[str]:
    notes = []
    answered = [asked.chat for asked in served.asked if asked.chat.error is None]
    missing = [
        what
        for what, absent in (
            ("prompts as tokens (their number was compared)", all(a.prompt_ids is None for a in answered)),
            ("answers as tokens (texts were compared)", all(a.ids is None for a in answered)),
            ("log-probs", all(not a.logprobs for a in answered)),
        )
        if absent
    ]
    if missing:
        notes.append(f"This server does not report {', '.join(missing)}.")
    if texts := cases[0].stop_texts:
        notes.append(
            f"Answers end with {texts[0]!r}, which is no token: clients have to send it as `stop`, as was done."
        )
    if served.text_prompt_ids is not None and served.text_prompt_ids[1:] == cases[0].prompt_ids:
        notes.append(
            f"Clients that send the prompt as text to /v1/completions get {decode(served.text_prompt_ids[:1])!r} twice "
            "unless they send add_special_tokens: false."
        )
    if judged.kind is Kind.TRAINED and judged.base_alike is False:
        notes.append(f"The model {served.base_name!r} beside it is not the base model that was trained.")
    if all(case.finish == "length" for case in cases):
        notes.append("No golden answer comes to an end, so stops were not checked.")
    return notes
