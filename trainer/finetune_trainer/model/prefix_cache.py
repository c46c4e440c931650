"""Keys and values of what rows of several packs begin with: computed once, attended to by all of them.

Each pack adds to the gradients of these, and their sum goes back through the prefix in the end. Two packs' activations
are in memory at a time, the prefix's and one more, however many there are.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.model.prefix_tree import Pack


class AttendsTwiceError(Exception):
    """A layer asks for attention more than once."""


class PrefixCache:
    """What the layers of one model have made of one prefix.

    Shapes as in `tree_attention.py`: keys [1, K, P, D] and values [1, K, P, E].
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[torch.Tensor, ...]] = {}
        self._leaves: dict[Any, tuple[torch.Tensor, ...]] = {}
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        """Gradients of the packs so far, by what was made; in float32 at least."""

    def with_prefix(
        self, layer: Any, pack: Pack, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `layer` attends to: [1, K, before + T, D] and [1, K, before + T, E]. The prefix's own are kept.

        Raises:
            AttendsTwiceError: these are not all that the layer made of the prefix.
        """
        if pack.before:
            before = self._leaves[layer]
            return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        # Layers that are computed again in the backward pass make the same once more.
        if not self._leaves:
            if layer in self._made:
                raise AttendsTwiceError
            self._made[layer] = key, value
        return key, value

    def close(self) -> None:
        """The prefix is through."""
        for layer, made in self._made.items():
            self._leaves[layer] = tuple(each.detach().requires_grad_(each.requires_grad) for each in made)

    def add_gradients(self) -> None:
        """A pack's backward pass is through."""
        for layer, leaves in self._leaves.items():
            for made, leaf in zip(self._made[layer], leaves, strict=True):
                if leaf.grad is None:
                    continue
                precise = leaf.grad.to(torch.promote_types(leaf.dtype, torch.float32))
                self._sums[made] = self._sums[made] + precise if made in self._sums else precise
                leaf.grad = None

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of the prefix, with what the packs have added.

        Args:
            loss: of what is predicted from the prefix itself.
        """
        sums = [gradient.to(made.dtype) for made, gradient in self._sums.items()]
        torch.autograd.backward([loss, *self._sums], [torch.ones_like(loss), *sums])
