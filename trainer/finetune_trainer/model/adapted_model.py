"""The base model with its adapter, as training, gate and evaluation run it: batches in, losses out.

One process and sixteen run the same: ranks share nothing but the sums of their gradients, and where the base is
sharded, FSDP gathers its weights inside these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.batch import Batch
from finetune_trainer.model.decoder import decoder_of
from finetune_trainer.model.fused_kernels import FusedKernels, can_fuse, fuse_kernels
from finetune_trainer.model.fused_lora import fuse_lora, unfuse_lora
from finetune_trainer.model.head import Head
from finetune_trainer.model.loss import Loss, correct_targets, summed_loss, takes_logits_to_keep, target_logits
from finetune_trainer.model.packed_attention import PackedDecoder, recomputed
from finetune_trainer.model.prefix_cache import PrefixCache
from finetune_trainer.model.prefix_tree import AnyBatch, Pack, PrefixedPacks

_HALF = (torch.bfloat16, torch.float16)


class AdaptedModel:
    """A PeftModel, and how batches go through it.

    Args:
        peft: the PeftModel; all that it trains is in float32.
        device: where batches are computed.
        sharded: the base is shared out among the ranks, so all have to run equally many batches.
        gathered: makes the context in which the weights of a sharded output head are whole.
    """

    def __init__(
        self,
        peft: Any,
        device: torch.device,
        *,
        sharded: bool = False,
        gathered: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.peft = peft
        self.base = peft.get_base_model()
        self.device = device
        self.sharded = sharded
        self.dtype: torch.dtype = self.base.dtype
        self.trained: list[torch.nn.Parameter] = [each for each in peft.parameters() if each.requires_grad]
        self._keep = takes_logits_to_keep(self.base)
        self._gathered = gathered
        self._packed: PackedDecoder | None = None
        self._head: Head | None = None
        self._kernels: FusedKernels | None = None

    def fuse(self) -> None:
        """Compute in fewer passes over memory from now on, with the same mathematics."""
        fuse_lora(self.peft)
        # Of what is shared out a kernel finds a part.
        if self._kernels is None and not self.sharded and can_fuse(self.device):
            self._kernels = fuse_kernels(decoder_of(self.base), self.device, self.dtype)

    def unfuse(self) -> None:
        """Undo `fuse`: the model computes by PEFT's and its own code."""
        unfuse_lora(self.peft)
        if self._kernels is not None:
            self._kernels.undo()
        self._kernels = None

    def take_packs(self) -> None:
        """Make it ready for packs.

        Raises:
            PackingRefusedError: it is not built for that.
        """
        self._packed = PackedDecoder(self.base)
        self._head = Head(self.base, decoder_of(self.base))

    def leave_packs(self) -> None:
        """Undo `take_packs`."""
        if self._packed is not None:
            self._packed.undo()
        self._packed = self._head = None

    def checkpoint_activations(self, every: int = 1) -> bool:
        """Compute activations again in the backward pass from now on; whether the model knows how.

        Args:
            every: of every so many-th layer; the others keep theirs.
        """
        if not getattr(self.base, "supports_gradient_checkpointing", False):
            return False
        # Random numbers are those of the forward pass, and so is the pack.
        settings = {"use_reentrant": False, "context_fn": recomputed}
        # Code of others that overrides it knows no number.
        self.base.gradient_checkpointing_enable(settings, **({"every_n_layers": every} if every > 1 else {}))
        return True

    def loss(self, batch: AnyBatch) -> Loss:
        """The loss of a batch; of packs behind a prefix only without gradients, which `backward` makes."""
        batch = batch.to(self.device)
        if isinstance(batch, PrefixedPacks):
            cache = PrefixCache()
            found = [self._loss_of_pack(batch.prefix, cache)]
            cache.close()
            found += [self._loss_of_pack(pack, cache) for pack in batch.packs]
            losses, correct = zip(*found, strict=True)
            return torch.stack(losses).sum(), torch.stack(correct).sum()
        if isinstance(batch, Pack):
            return self._loss_of_pack(batch)
        with self._autocast():
            # A backward pass gathers the head once more and shares it out again by itself.
            with nullcontext() if torch.is_grad_enabled() else self._gathered():
                logits, targets = target_logits(self.base, batch, keep=self._keep)
            loss = summed_loss(logits, targets)
        if torch.is_grad_enabled():
            return loss, torch.zeros((), dtype=torch.int64, device=loss.device)
        return loss, correct_targets(logits, targets)

    def logits(self, batch: Batch) -> torch.Tensor:
        """What the model says where the batch predicts, [B * P, V], without gradients."""
        with torch.no_grad(), self._autocast(), self._gathered():
            return target_logits(self.base, batch.to(self.device), keep=self._keep)[0]

    def backward(self, batches: Sequence[AnyBatch], scale: float = 1.0) -> torch.Tensor:
        """Forward and backward pass of each batch; gradients are added to those in the model.

        Args:
            batches: at least one.
            scale: factor of losses and gradients.

        Returns:
            float32 []: sum of the losses times `scale`.

        Raises:
            JobError: ModelUnsupported, the model records nothing of what it computes.
        """
        total = torch.zeros((), device=self.device)
        for batch in batches:
            if isinstance(batch, PrefixedPacks):
                total += self._backward_behind_prefix(batch.to(self.device), scale)
            else:
                loss = self._recorded(self.loss(batch)) * scale
                torch.autograd.backward(loss)
                total += loss.detach()
        return total

    def _backward_behind_prefix(self, batch: PrefixedPacks, scale: float) -> torch.Tensor:
        cache = PrefixCache()
        loss_of_prefix = self._recorded(self._loss_of_pack(batch.prefix, cache)) * scale
        cache.close()
        total = loss_of_prefix.detach().clone()
        for pack in batch.packs:
            loss = self._recorded(self._loss_of_pack(pack, cache)) * scale
            torch.autograd.backward(loss)
            cache.add_gradients()
            total += loss.detach()
        cache.backward(loss_of_prefix)
        return total

    def _loss_of_pack(self, pack: Pack, cache: PrefixCache | None = None) -> Loss:
        if self._packed is None or self._head is None:
            raise RuntimeError("a pack before take_packs")
        with self._autocast():
            return self._head.loss(self._packed(pack, cache), pack.sources, pack.targets, self._gathered)

    def _recorded(self, found: Loss) -> torch.Tensor:
        loss, _ = found
        if not loss.requires_grad:
            raise JobError(
                Reason.MODEL_UNSUPPORTED,
                "No gradient gets from the loss to the adapter: this model's code computes without recording it, so it "
                "cannot be trained. Choose another model.",
            )
        return loss

    def _autocast(self) -> AbstractContextManager[object]:
        """Half-precision weights meet float32 ones of the adapter; what needs more than half precision gets it."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype in _HALF else nullcontext()
