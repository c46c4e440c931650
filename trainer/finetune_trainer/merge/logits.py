"""Whether two models say the same: their logits on a few prompts, and how far rounding may part them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.model.loss import takes_logits_to_keep

GOLDEN = "golden.jsonl"
_PROMPTS = 4
_PROMPT_TOKENS = 256
_COMPARED_TOKENS = 32
"""Positions of each prompt at whose logits is looked: a vocabulary of 256 k makes 32 MB of them."""
_GOLDEN_LIMIT_BYTES = 16_000_000
_TEXTS = (
    "What is the capital of France?",
    "Is this safe?\n\nUser: How do I sharpen a kitchen knife?",
    "def fibonacci(n):\n    return",
)
_NOISE = 4.0
"""Differences are told from those between two equal passes (kernels that add in any order) by this factor."""
_ROUNDING = 512.0
"""Units in the last place of the largest logit by which another order of the same sums, through all layers of a model,
may differ. The most that was seen of 181 model types is 74; a fault makes ten thousands."""

Logits = list[torch.Tensor]
"""float32 [P, V] on CPU, of each prompt."""


@dataclass(frozen=True)
class Difference:
    """Between the logits of two models on the same prompts."""

    largest: float
    mean: float
    """Of absolute differences."""
    same_choice: float
    """Share of positions at which both rank the same token first, 0 to 1."""


def prompts(adapter: Path, tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """Token ids to compare on: the adapter's golden prompts, else a few texts, and ids from all over the vocabulary.

    Args:
        adapter: the adapter's folder.
        tokenizer: that goes with it.
        vocabulary: number of ids that the model has an embedding for.
    """
    found = _golden(adapter / GOLDEN) or [_rendered(tokenizer, text) for text in _TEXTS]
    # What an adapter does to an embedding or a head shows at the tokens that it was trained on.
    spread = torch.linspace(0, vocabulary - 1, steps=min(_COMPARED_TOKENS, vocabulary)).long().tolist()
    inside = [[token for token in ids if token < vocabulary][-_PROMPT_TOKENS:] for ids in [*found[:_PROMPTS], spread]]
    return [ids for ids in inside if ids]


def logits(model: Any, rows: Sequence[Sequence[int]]) -> Logits:
    """Of the last positions of each row, one row at a time."""
    device = next(model.parameters()).device
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    keep = {"logits_to_keep": _COMPARED_TOKENS} if takes_logits_to_keep(inner) else {}
    found = []
    model.eval()
    with torch.no_grad():
        for ids in rows:
            row = torch.tensor([list(ids)], device=device)
            output = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **keep)
            found.append(output.logits[0, -_COMPARED_TOKENS:].float().cpu())
    return found


def difference(some: Logits, others: Logits) -> Difference:
    """Between `some` and `others`; NaN where a logit is none, which is neither small nor large."""
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(some, others, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(some, others, strict=True)])
    return Difference(float(apart.max()), float(apart.double().mean()), float(same.double().mean()))


def allowed(reference: Logits, again: Logits, dtype: torch.dtype) -> float:
    """How far logits may lie from `reference` by rounding alone.

    Args:
        reference: of a model.
        again: of the same model once more, which tells the noise of the device.
        dtype: what was computed in.
    """
    largest = max(float(part.abs().max()) for part in reference)
    return max(_NOISE * difference(reference, again).largest, _ROUNDING * torch.finfo(dtype).eps * largest)


def _golden(file: Path) -> list[list[int]]:
    """Prompt and answer of each golden conversation; none where the file is not what it should be."""
    try:
        if file.stat().st_size > _GOLDEN_LIMIT_BYTES:
            return []
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[: 10 * _PROMPTS]]
    except (OSError, ValueError):
        return []
    rows = [_ids(line, "prompt_ids") + _ids(line, "ids") for line in lines if isinstance(line, Mapping)]
    return sorted(filter(None, rows), key=len)[-_PROMPTS:]


def _ids(line: Mapping[str, Any], key: str) -> list[int]:
    ids = line.get(key)
    return [one for one in ids if isinstance(one, int) and one >= 0] if isinstance(ids, list) else []


def _rendered(tokenizer: Any, text: str) -> list[int]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is not None:
        try:
            messages = [{"role": "user", "content": text}]
            whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(whole, add_special_tokens=False)["input_ids"])
        except TemplateError:
            # A template that wants other conversations; any text of the model's language will do.
            pass
    return list(tokenizer(text)["input_ids"])
