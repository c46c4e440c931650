"""All gradients of a step in one vector: summed over the ranks by one collective, clipped by one kernel.

The adapter is small beside the model, so there is nothing to win by sending its gradients while others are computed, as
DDP does; and a rank that runs out of memory has not sent half of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


class Gradients:
    """Gradients of `parameters`, which are views of one vector from now on.

    Args:
        parameters: all that is trained, in float32, on one device.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        # One more for the loss, which is summed with them.
        self._sums = torch.zeros(sum(sizes) + 1, device=parameters[0].device)
        self._flat = self._sums[:-1]
        self._parts = torch.split(self._flat, sizes)
        for parameter, part in zip(parameters, self._parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def zero(self) -> None:
        """Begin a step, or begin it anew."""
        self._sums.zero_()

    def reduce(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum gradients and losses over all ranks.

        Args:
            loss: float32 [], this rank's part.

        Returns:
            float32 []: that of all ranks.
        """
        self._sums[-1] = loss
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        return self._sums[-1].clone()

    def clip(self, most: float) -> torch.Tensor:
        """Make the whole gradient no longer than `most`, or leave it where that is 0; float32 []: how long it was."""
        # By parts: over one long vector in float32 the fourth digit is lost on CPUs.
        norm = torch.nn.utils.get_total_norm(self._parts)
        if most:
            self._flat.mul_((most / (norm + 1e-6)).clamp(max=1.0))
        return norm
