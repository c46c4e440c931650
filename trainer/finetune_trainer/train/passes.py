"""Forward and backward passes over a step's batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.batch import Batch
from finetune_trainer.model.loss import Loss, computed, target_logits
from finetune_trainer.model.prefix_tree import Pack


class Passes:
    """Forward and backward passes as accelerate wants them.

    Args:
        accelerator: transformers' own.
        device: what is trained on.
        autocast: makes the context in which losses are computed.
        keep: whether the model takes `logits_to_keep`.
    """

    def __init__(
        self, accelerator: Any, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]], *, keep: bool
    ) -> None:
        self.device = device
        self._accelerator = accelerator
        self._autocast = autocast
        self._keep = keep

    def forward(self, model: Any, batch: Batch | Pack) -> AbstractContextManager[Loss]:
        """The loss of a batch; its backward pass belongs inside."""
        return computed(model, batch.to(self.device), keep=self._keep)

    def loss(self, model: Any, batch: Batch | Pack) -> torch.Tensor:
        """The loss of a batch, float32 [], without gradients."""
        with torch.no_grad(), self._autocast(), self.forward(model, batch) as (loss, _):
            return loss

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """What the model says where the batch predicts, [B * P, V], without gradients."""
        with torch.no_grad(), self._autocast():
            return target_logits(model, batch.to(self.device), keep=self._keep)[0]

    def __call__(
        self, model: Any, batches: list[Batch | Pack], scale: float = 1.0, *, reduce: bool = True
    ) -> torch.Tensor:
        """Sum of the losses times `scale`, float32 []; gradients are left in the model.

        Args:
            model: as training runs it.
            batches: at least one.
            scale: factor of losses and gradients.
            reduce: average gradients over the ranks, in the last backward pass.

        Raises:
            JobError: ModelUnsupported, the model records nothing of what it computes.
        """
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, 1):
            last = reduce and number == len(batches)
            with (
                nullcontext() if last else self._accelerator.no_sync(model),
                self._autocast(),
                self.forward(model, batch) as (loss, _),
            ):
                if not loss.requires_grad:
                    raise JobError(
                        Reason.MODEL_UNSUPPORTED,
                        "No gradient gets from the loss to the adapter: this model's code computes without recording "
                        "it, so it cannot be trained. Choose another model.",
                    )
                scaled = loss * scale
                self._accelerator.backward(scaled)
            total += scaled.detach()
        return total
