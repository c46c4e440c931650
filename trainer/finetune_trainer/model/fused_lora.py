"""A linear layer and its LoRA branch in one step, for CPUs.

PEFT computes the branch beside the layer and adds the two: three passes over tensors as large as the layer's output
forwards, and as many backwards, which on a CPU wait for memory. Here the branch is added by the matrix product itself,
and the gradient of B is computed the way round that BLAS is fast at. The mathematics is PEFT's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn


def fuse_lora(model: Any) -> None:
    """Make every plain LoRA layer of `model` compute itself this way wherever it can."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and "forward" not in vars(module):
            module.forward = partial(_forward, module, module.forward)  # type: ignore[method-assign]


def unfuse_lora(model: Any) -> None:
    """Undo `fuse_lora`."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            vars(module).pop("forward", None)


def _forward(module: Any, original: Any, x: torch.Tensor, *args: Any, **others: Any) -> torch.Tensor:
    names = module.active_adapters
    if args or others or len(names) != 1 or not _is_plain(module, names[0], x):
        return original(x, *args, **others)  # type: ignore[no-any-return]  # PEFT's
    (name,) = names
    dropout = module.lora_dropout[name]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    base = module.base_layer
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    flat = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _FusedLinear.apply(flat, base.weight, base.bias, a, b, module.scaling[name], share)  # type: ignore[no-untyped-call]  # torch's
    return y.view(*x.shape[:-1], -1)


def _is_plain(module: Any, name: str, x: torch.Tensor) -> bool:
    """Whether PEFT would compute W x + scale B A dropout(x) here, in float32 on a CPU."""
    base = module.base_layer
    if type(base) is not nn.Linear or module.disable_adapters or module.merged or name in module.lora_variant:
        return False
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    tensors = (x, base.weight, a.weight, b.weight)
    return (
        type(a) is nn.Linear
        and a.bias is None
        and b.bias is None
        and type(dropout) in (nn.Dropout, nn.Identity)
        and not base.weight.requires_grad
        and all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


class _FusedLinear(torch.autograd.Function):
    """x [T, I] -> [T, O], for W [O, I], A [R, I] and B [O, R]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropped: float,
    ) -> torch.Tensor:
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        mask = None
        taken = x
        if dropped:
            taken, mask = torch.native_dropout(x, dropped, True)
        hidden = taken @ a.T
        y.addmm_(hidden, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, hidden, mask)
        ctx.scale, ctx.dropped = scale, dropped
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight, a, b, hidden, mask = ctx.saved_tensors
        to_hidden = (gradient @ b).mul_(ctx.scale)
        # The other way round, gradient.T @ hidden, takes several times as long.
        to_b = (hidden.T @ gradient).mul_(ctx.scale).T
        taken = x if mask is None else x * mask * (1 / (1 - ctx.dropped))
        to_a = to_hidden.T @ taken
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ weight
            if mask is None:
                to_x.addmm_(to_hidden, a)
            else:
                to_x.addcmul_(to_hidden @ a, mask.to(a.dtype), value=1 / (1 - ctx.dropped))
        return to_x, None, None, to_a, to_b, None, None
