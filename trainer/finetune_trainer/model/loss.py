"""Cross-entropy as training sums it.

It is a sum over the tokens that are trained, so that the caller can divide by their number over all batches and ranks:
a mean of means would weigh short rows more.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.model.batch import IGNORED, Batch

Loss = tuple[torch.Tensor, torch.Tensor]
"""float32 []: sum of the cross-entropies in nats; int64 []: targets that the model ranks first, which are counted only
where no gradients are recorded (0 otherwise)."""


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model's forward computes logits for chosen positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def target_logits(model: Any, batch: Batch, *, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets at the positions where any row of the batch predicts something.

    Args:
        model: a causal language model.
        batch: padded sequences [B, L].
        keep: the model takes `logits_to_keep`, so its output head runs at those positions only.

    Returns:
        logits [B * P, V] and targets int64 [B * P], IGNORED where a row predicts nothing.
    """
    extra: dict[str, Any] = {"logits_to_keep": batch.positions} if keep else {}
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **extra).logits
    if not keep:
        logits = logits[:, batch.positions]
    return logits.flatten(0, 1), batch.targets[:, batch.positions].flatten()


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 []: sum of the cross-entropy, in nats, over targets that are not IGNORED."""
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def correct_targets(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """int64 []: targets that the model ranks first."""
    return (logits.argmax(dim=-1) == targets).sum()
