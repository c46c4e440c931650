"""Verifies an adapter on this machine: its files, its tensors, and the golden prompts asked again of plain PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.model.adapter_state import put_tensors
from finetune_trainer.model.greedy import Greedy
from finetune_trainer.model.load import load_model, training_dtype
from finetune_trainer.storage import fetch_model
from finetune_trainer.verify.at_hand import judge_at_hand
from finetune_trainer.verify.compare import Answer
from finetune_trainer.verify.files import check_files, check_tensors, read_tensors
from finetune_trainer.verify.folder import AdapterFolder
from finetune_trainer.verify.golden import GoldenCase, read_golden
from finetune_trainer.verify.report import Check, Report, Status
from finetune_trainer.verify.stops import read_ends

_BEYOND = 16
"""Tokens that an answer may have beyond the trained one, to see that it goes on."""


@dataclass(frozen=True)
class Base:
    """Where the base model is."""

    address: str
    """Folder, s3:// address or Hub name."""
    revision: str | None = None


def verify_locally(folder: AdapterFolder, *, base: Base | None = None, trust_remote_code: bool = False) -> Report:
    """Whether the adapter in `folder` is whole and answers as it was trained.

    Args:
        folder: the adapter.
        base: its base model; the one that the adapter names when None.
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
    base = base or _named_base(folder)
    tokenizer = _tokenizer(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = fetch_model(base.address, base.revision, trust_remote_code=trust_remote_code, key="--base-model").path
    dtype = training_dtype(device)
    plain = load_model(weights, dtype=dtype, trust_remote_code=trust_remote_code, name=base.address).to(device)
    model = _opened(plain, folder.path, tensors, base.address)
    if isinstance(model, Check):
        return judge_at_hand([files, model], cases, notes=notes)
    asked, alone = _answers(model, folder.path, tokenizer, cases)
    prompts = [_rendered(tokenizer, case) for case in cases]
    return judge_at_hand(
        checks, cases, prompts=prompts, answers=asked, base=alone, base_model=base.address, notes=notes
    )


def _named_base(folder: AdapterFolder) -> Base:
    if folder.base_model is None:
        raise JobError(Reason.MODEL_NOT_FOUND, f"{folder.address} names no base model: give one with --base-model.")
    return Base(folder.base_model, folder.base_revision)


def _tokenizer(folder: AdapterFolder) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except Exception as error:  # A foreign folder can make transformers raise anything.
        raise JobError(
            Reason.INVALID_SPEC,
            f"The tokenizer in {folder.address} cannot be loaded ({first_line(error)}): copy the adapter again.",
        ) from error


def _opened(base: Any, folder: Path, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """The adapter on its base model, as plain PEFT opens it; or the check that says why not."""
    from peft import PeftModel

    model: Any = None
    try:
        with warnings.catch_warnings():
            # Keys for servers in adapter_config.json; tensors without a place are found below.
            warnings.simplefilter("ignore", UserWarning)
            model = PeftModel.from_pretrained(base, str(folder), torch_device="cpu").eval()
        fault = put_tensors(model, tensors)
    except Exception as error:  # PEFT lets whatever it stumbles over through.
        fault = f"PEFT cannot open it ({first_line(error)})"
    if fault is None:
        return model
    cure = "give the base model that was trained with --base-model"
    return Check("tensors", Status.FAULT, f"the adapter does not fit {name}: {fault}; {cure}")


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
