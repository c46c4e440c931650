"""Verifies an adapter on this machine: its files, its tensors, and the golden prompts asked again of plain PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.errors import JobError
from finetune_trainer.model.greedy import Greedy
from finetune_trainer.model.load import load_model, training_dtype
from finetune_trainer.published.base import Base, fetch_base, load_tokenizer_of, put_adapter, quantization_of
from finetune_trainer.published.folder import AdapterFolder
from finetune_trainer.verify.at_hand import judge_at_hand
from finetune_trainer.verify.compare import Answer
from finetune_trainer.verify.files import check_files, check_tensors, read_tensors
from finetune_trainer.verify.golden import GoldenCase, read_golden
from finetune_trainer.verify.report import Check, Report, Status
from finetune_trainer.verify.stops import read_ends

_BEYOND = 16
"""Tokens that an answer may have beyond the trained one, to see that it goes on."""


def verify_locally(folder: AdapterFolder, *, base: Base | None = None, trust_remote_code: bool = False) -> Report:
    """Whether the adapter in `folder` is whole and answers as it was trained.

    Args:
        folder: the adapter.
        base: its base model; the one that it was trained on when None.
        trust_remote_code: whether the base model's own code may run.

    Raises:
        JobError: the base model cannot be had or loaded.
    """
    files, notes = check_files(folder.path)
    checks = [files]
    if files.status is Status.FAULT:
        return judge_at_hand(checks, [], notes=notes)
    cases = read_golden(folder.path)
    tensors = read_tensors(folder.path)
    checks.append(tensors if isinstance(tensors, Check) else check_tensors(tensors))
    if isinstance(tensors, Check) or checks[-1].status is Status.FAULT:
        return judge_at_hand(checks, cases, notes=notes)
    tokenizer = load_tokenizer_of(folder.path, folder.address)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named, fetched = fetch_base(folder, base, trust_remote_code=trust_remote_code)
    notes += fetched.warnings
    alone = load_model(
        fetched.path,
        dtype=training_dtype(device),
        trust_remote_code=trust_remote_code,
        name=named.address,
        quantization=quantization_of(folder),
        device=device,
    )
    try:
        model = put_adapter(alone, folder, named.address)
    except JobError as error:
        fault = Check("tensors", Status.FAULT, error.message[0].lower() + error.message[1:].rstrip("."))
        return judge_at_hand([files, fault], cases, notes=notes)
    asked, unadapted = _answers(model, folder.path, tokenizer, cases)
    prompts = [_rendered(tokenizer, case) for case in cases]
    return judge_at_hand(
        checks, cases, prompts=prompts, answers=asked, base=unadapted, base_model=named.address, notes=notes
    )


def _answers(
    model: Any, folder: Path, tokenizer: Any, cases: Sequence[GoldenCase]
) -> tuple[list[Answer], list[Answer]]:
    """The adapter's answers and the base model's, with the stops that the folder declares."""
    ends = read_ends(folder, tokenizer)
    greedy = Greedy(model, stop_ids=ends.token_ids, ended=ends.by_text)

    def ask(case: GoldenCase, limit: int) -> Answer:
        found = greedy.answer(case.prompt_ids, limit)
        text, ended = ends.visible(found.ids)
        return Answer(text, found.ids, found.logprobs, ended, len(found.ids))

    adapted, alone = [], []
    for case in cases:
        adapted.append(ask(case, len(case.ids) + (_BEYOND if case.finish == "stop" else 0)))
        with model.disable_adapter():
            alone.append(ask(case, len(case.base_ids)))
    return adapted, alone


def _rendered(tokenizer: Any, case: GoldenCase) -> str | None:
    """The prompt that the folder's own chat template makes of a case; None where it makes none."""
    messages = [message.model_dump() for message in case.messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # Templates are foreign programs; the verdict says that there is no prompt.
        return None
