"""Asks an OpenAI-compatible server the golden prompts, and whatever tells one fault from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.published.folder import AdapterFolder
from finetune_trainer.verify.compare import Answer, Decode, Likeness, match, trained_answer
from finetune_trainer.verify.golden import GOLDEN, GoldenCase, read_golden
from finetune_trainer.verify.http import RefusedError, Server, ServerError
from finetune_trainer.verify.prompts import PromptLikeness, match_prompt
from finetune_trainer.verify.report import Report
from finetune_trainer.verify.served import Asked, Served, judge

_BEYOND = 16
"""Tokens that an answer may have beyond the trained one, to see that it goes on."""
_PROBED = 4
"""Cases that are asked in other ways as well."""
_NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_EXTRAS: tuple[dict[str, Any], ...] = ({"return_token_ids": True, "logprobs": True}, {"logprobs": True}, {})
"""What is asked for beyond an answer, most first: servers refuse what they do not know, or leave it out."""


def verify_server(folder: AdapterFolder, server: Server, model: str) -> Report:
    """Whether `server` serves the adapter in `folder` as it was trained, under the name `model`.

    Raises:
        ServerError: the server cannot be asked at all.
        JobError: the folder cannot be read, or has no golden prompts.
    """
    cases = read_golden(folder.path)
    if not cases:
        raise JobError(
            Reason.INVALID_SPEC,
            f"{folder.address} has no {GOLDEN}, so there is nothing to ask a server: train with output.golden: true.",
        )
    tokenizer = folder.tokenizer()

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return judge(observe(server, model, cases, decode), cases, decode, base_model=folder.base_model)


def observe(server: Server, model: str, cases: Sequence[GoldenCase], decode: Decode) -> Served:
    """All that the verdict needs.

    Raises:
        ServerError: the server cannot be asked at all.
    """
    entries = _models(server)
    listed = None if entries is None else [entry["id"] for entry in entries]
    served = Served(model, listed)
    if listed is not None and model not in listed:
        return served
    parent = next((entry.get("parent") for entry in entries or [] if entry["id"] == model), None)
    if isinstance(parent, str) and listed is not None and parent in listed:
        served.base_name = parent
    asker = _Asker(server, cases[0].stop_texts)
    served.asked = [Asked(asker.chat(model, case)) for case in cases]
    if all(asked.chat.error is not None for asked in served.asked):
        return served
    odd = [
        index
        for index, (case, asked) in enumerate(zip(cases, served.asked, strict=True))
        if not _fine(case, asked, decode)
    ]
    for index in odd[:_PROBED]:
        case, asked = cases[index], served.asked[index]
        asked.neutral = asker.chat(model, case, **_NEUTRAL)
        asked.direct = asker.completion(model, case)
    others = [index for index in range(len(cases)) if index not in odd]
    for index in (odd + others)[:_PROBED] if served.base_name else ():
        served.asked[index].base = asker.completion(str(served.base_name), cases[index])
    served.text_prompt_ids = asker.prompt_ids(model, cases[0])
    served.plain_prompt_ids = asker.prompt_ids(model, cases[0], add_special_tokens=False)
    return served


def _models(server: Server) -> list[dict[str, Any]] | None:
    """The entries of /models that have a name; None where there is no such route."""
    try:
        content = server.get("/models")
    except RefusedError:
        return None
    data = content.get("data")
    if not isinstance(data, list):
        raise ServerError(f"{server.base}/models has no list of models: it is no OpenAI-compatible server.")
    return [entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _fine(case: GoldenCase, asked: Asked, decode: Decode) -> bool:
    found = match(asked.chat, trained_answer(case), decode)
    return (
        match_prompt(asked.chat, case) in (PromptLikeness.SAME, PromptLikeness.UNKNOWN)
        and found.likeness in (Likeness.SAME, Likeness.TIE)
        and not found.ran_on
    )


class _Asker:
    """Sends golden prompts; remembers what the server lets itself be asked for."""

    def __init__(self, server: Server, stop_texts: Sequence[str]) -> None:
        self._server = server
        self._stop = {"stop": list(stop_texts[:4])} if stop_texts else {}
        self._level = 0

    def chat(self, model: str, case: GoldenCase, **settings: float) -> Answer:
        """The answer to the messages of `case`."""
        body = {
            "model": model,
            "messages": [message.model_dump() for message in case.messages],
            "temperature": 0,
            "max_tokens": _room(case),
            **self._stop,
            **settings,
        }
        while True:
            try:
                content = self._server.post("/chat/completions", body | _EXTRAS[self._level])
                return _chat_answer(content)
            except RefusedError as error:
                if error.status == 404 and "model" not in str(error).lower():
                    raise ServerError(
                        f"{self._server.base}/chat/completions does not exist: give the address that ends before /v1."
                    ) from error
                if error.status not in (400, 422) or self._level == len(_EXTRAS) - 1 or settings:
                    return Answer(error=str(error))
                # A template that is missing stays missing; all else may be a field that this server does not know.
                self._level += 1

    def completion(self, model: str, case: GoldenCase) -> Answer | None:
        """The answer to the token ids of `case`; None where the server takes none."""
        body = {
            "model": model,
            "prompt": case.prompt_ids,
            "temperature": 0,
            "max_tokens": _room(case),
            "return_token_ids": True,
            "logprobs": 1,
            **self._stop,
        }
        try:
            return _completion_answer(self._server.post("/completions", body))
        except RefusedError:
            return None

    def prompt_ids(self, model: str, case: GoldenCase, **settings: bool) -> list[int] | None:
        """Tokens that the server makes of the prompt's text; None where it does not say."""
        body = {
            "model": model,
            "prompt": case.prompt,
            "temperature": 0,
            "max_tokens": 1,
            "return_token_ids": True,
            **settings,
        }
        try:
            answer = _completion_answer(self._server.post("/completions", body))
        except RefusedError:
            return None
        return None if answer is None else answer.prompt_ids


def _room(case: GoldenCase) -> int:
    return len(case.ids) + (_BEYOND if case.finish == "stop" else 0)


def _chat_answer(content: dict[str, Any]) -> Answer:
    choice = _choice(content)
    message = choice.get("message")
    if not isinstance(message, dict):
        return Answer(error="its answer has no message")
    entries = _part(choice.get("logprobs"), "content")
    logprobs = [entry.get("logprob") if isinstance(entry, dict) else None for entry in _list(entries)]
    return _answer(content, choice, message.get("content"), logprobs, content.get("prompt_token_ids"))


def _completion_answer(content: dict[str, Any]) -> Answer | None:
    choice = _choice(content)
    if not isinstance(choice.get("text"), str):
        return None
    logprobs = _list(_part(choice.get("logprobs"), "token_logprobs"))
    return _answer(content, choice, choice["text"], logprobs, choice.get("prompt_token_ids"))


def _answer(content: dict[str, Any], choice: dict[str, Any], text: Any, logprobs: list[Any], prompt: Any) -> Answer:
    usage = content.get("usage")
    finish = choice.get("finish_reason")
    numbers = [float(value) for value in logprobs if isinstance(value, int | float) and math.isfinite(value)]
    return Answer(
        text=text if isinstance(text, str) else "",
        ids=_ids(choice.get("token_ids")),
        logprobs=numbers if numbers and len(numbers) == len(logprobs) else None,
        ended={"stop": True, "length": False}.get(finish) if isinstance(finish, str) else None,
        tokens=_count(_part(usage, "completion_tokens")),
        prompt_ids=_ids(prompt),
        prompt_tokens=_count(_part(usage, "prompt_tokens")),
    )


def _choice(content: dict[str, Any]) -> dict[str, Any]:
    choices = content.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _ids(value: Any) -> list[int] | None:
    """`value` if it is a list of token ids."""
    whole = isinstance(value, list) and value and all(type(each) is int and 0 <= each < 2**31 for each in value)
    return value if whole else None


def _part(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
