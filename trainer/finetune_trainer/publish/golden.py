"""Makes golden.jsonl: a few prompts of the job's own data with what the trained adapter answers to them.

The answers are the model's in memory, at the moment of publication and with the tensors that are published. With them
anybody can later ask a server, or this machine, whether it still answers as trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.prompt_format import Message, RenderError
from finetune_trainer.data.conversation import RowError, parse_row
from finetune_trainer.data.dataset import DataSource, TokenizedData
from finetune_trainer.errors import first_line
from finetune_trainer.model.adapter_state import put_tensors
from finetune_trainer.model.greedy import Continuation, Greedy
from finetune_trainer.verify.golden import (
    ANSWER_LIMIT_TOKENS,
    BASE_TOKENS,
    FILE_LIMIT_BYTES,
    GOLDEN,
    LINE_LIMIT_BYTES,
    LOGPROB_TOKENS,
    PROMPT_LIMIT_TOKENS,
    GoldenCase,
    GoldenMessage,
)
from finetune_trainer.verify.stops import AnswerEnds, read_ends

CASES = 10
BUDGET_SECONDS = 300.0
"""Answers take seconds. A model that computes every token from the beginning gets fewer and shorter ones."""

_SHORTEST, _SPREAD = 6, 10
"""Rows that are looked at in each tenth of the file: its shortest ones, and some in between."""


@dataclass(frozen=True)
class Prompt:
    """A conversation of the data up to a user's message."""

    messages: tuple[Message, ...]
    text: str
    ids: list[int]


def write_golden(
    folder: Path,
    *,
    model: Any,
    trained: Mapping[str, torch.Tensor],
    tokenizer: Any,
    source: DataSource,
    rows: TokenizedData,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Write golden.jsonl into an adapter's `folder`; what was written, or why nothing was, as a sentence.

    Args:
        folder: with the adapter's generation_config.json and prompt_format.yaml.
        model: the PeftModel in memory, which is left with the tensors in `trained`.
        trained: the tensors that are published.
        tokenizer: transformers' tokenizer of the model.
        source: the data that prompts are taken from.
        rows: the same, tokenized.
        clock: seconds.

    Raises:
        JobError: the folder's own files cannot be read.
    """
    prompts = choose(source, rows)
    if not prompts:
        return f"{GOLDEN} is left out: {source.name} has no user message followed by an answer that is short enough."
    ends = read_ends(folder, tokenizer)
    training = model.training
    model.eval()
    try:
        if fault := put_tensors(model, trained):
            return f"{GOLDEN} is left out: {fault}."
        cases = _answered(model, prompts, ends, source.context_length, clock)
    except Exception as error:  # Foreign models fail in any way. An adapter without golden prompts is still one.
        return f"{GOLDEN} is left out, since this model cannot be asked while it is in memory ({first_line(error)})."
    finally:
        model.train(training)
    lines = _fitting([case.line() for case in cases])
    if not lines:
        return f"{GOLDEN} is left out: each of the prompts chosen has more than {LINE_LIMIT_BYTES:,} bytes."
    (folder / GOLDEN).write_bytes(b"".join(lines))
    return (
        f"{GOLDEN} holds {len(lines)} prompts of {source.name} with their answers, to verify servers with; "
        "output.golden: false leaves them out"
    )


def choose(source: DataSource, rows: TokenizedData) -> list[Prompt]:
    """Prompts spread over the file, short ones first and several turns among them; the same for the same file."""
    candidates = [_candidates(part, rows) for part in np.array_split(np.arange(len(rows)), CASES) if len(part)]
    lines = _lines(source.path, {int(rows.lines[row]) for row in chain.from_iterable(candidates)})
    chosen: dict[str, Prompt] = {}
    for part, numbers in enumerate(candidates):
        found = [
            prompt
            for row in numbers
            for prompt in _prompts(source, lines.get(int(rows.lines[row]), b""))
            if prompt.text not in chosen
        ]
        several = [prompt for prompt in found if any(message.role == "assistant" for message in prompt.messages)]
        single = [prompt for prompt in found if prompt not in several]
        # Every other one, so that there are both kinds where the data have both.
        preferred = (several or single) if part % 2 else (single or several)
        if preferred:
            shortest = min(preferred, key=lambda prompt: len(prompt.ids))
            chosen[shortest.text] = shortest
    return list(chosen.values())


def _candidates(part: Any, rows: TokenizedData) -> list[int]:
    """Some rows of int64 [n] `part`."""
    by_length = part[np.argsort(rows.row_tokens[part], kind="stable")][:_SHORTEST]
    spread = part[np.linspace(0, len(part) - 1, min(_SPREAD, len(part))).astype(np.int64)]
    return sorted({int(row) for row in (*by_length, *spread)})


def _lines(path: Path, wanted: set[int]) -> dict[int, bytes]:
    found = {}
    last = max(wanted, default=0)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number in wanted:
                found[number] = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if number >= last:
                break
    return found


def _prompts(source: DataSource, line: bytes) -> Iterator[Prompt]:
    """Prompts for the answers of one row, the one with most turns that is not too long."""
    if len(line) > LINE_LIMIT_BYTES:
        return
    try:
        conversation = parse_row(line, source.rules)
    except RowError:
        return
    messages = conversation.messages
    # Golden prompts are messages of a text each, for every server.
    if conversation.tools or any(message.fields for message in messages):
        return
    limit = min(PROMPT_LIMIT_TOKENS, (source.context_length or PROMPT_LIMIT_TOKENS) - 1)
    for index in range(len(messages) - 1, 0, -1):
        if messages[index].role != "assistant" or messages[index - 1].role != "user":
            continue
        try:
            text = source.renderer.prompt(messages[:index])
        except (RowError, RenderError):
            continue
        ids = source.tokenizer.prompt_ids(text)
        if 0 < len(ids) <= limit:
            yield Prompt(messages[:index], text, ids)
            return


def _answered(
    model: Any, prompts: Sequence[Prompt], ends: AnswerEnds, context: int | None, clock: Callable[[], float]
) -> list[GoldenCase]:
    deadline = clock() + BUDGET_SECONDS
    greedy = Greedy(model, stop_ids=ends.token_ids, ended=ends.by_text, deadline=deadline, clock=clock)
    cases: list[GoldenCase] = []
    for prompt in prompts:
        room = ANSWER_LIMIT_TOKENS if context is None else min(ANSWER_LIMIT_TOKENS, context - len(prompt.ids))
        adapted = greedy.answer(prompt.ids, room)
        with model.disable_adapter():
            base = greedy.answer(prompt.ids, min(BASE_TOKENS, room))
        cases.append(_case(model, prompt, ends, adapted, base))
        if clock() > deadline:
            break
    return cases


def _case(model: Any, prompt: Prompt, ends: AnswerEnds, adapted: Continuation, base: Continuation) -> GoldenCase:
    text, ended = ends.visible(adapted.ids)
    return GoldenCase(
        dtype=str(model.get_base_model().dtype).removeprefix("torch."),
        messages=[
            GoldenMessage.model_validate({"role": message.role, "content": message.content})
            for message in prompt.messages
        ],
        prompt=prompt.text,
        prompt_ids=prompt.ids,
        ids=adapted.ids,
        text=text,
        finish="stop" if ended else "length",
        logprobs=adapted.logprobs[:LOGPROB_TOKENS],
        margins=adapted.margins,
        scale=max(adapted.scale, base.scale),
        base_ids=base.ids,
        base_text=ends.visible(base.ids)[0],
        base_logprobs=base.logprobs[:LOGPROB_TOKENS],
        base_margins=base.margins,
        stop_token_ids=list(ends.token_ids),
        stop_texts=list(ends.texts),
    )


def _fitting(lines: Sequence[bytes]) -> list[bytes]:
    """As many of the lines as the file may hold, without those that are too long."""
    kept, size = [], 0
    for line in lines:
        if len(line) <= LINE_LIMIT_BYTES and size + len(line) <= FILE_LIMIT_BYTES:
            kept.append(line)
            size += len(line)
    return kept
