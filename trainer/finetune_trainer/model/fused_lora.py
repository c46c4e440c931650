"""A linear layer and its LoRA branch in one step.

PEFT computes the branch beside the layer and adds the two: three passes over tensors as large as the layer's output
forwards, and as many backwards, which wait for memory; and where the weights are in half precision it first makes a
float32 copy of the layer's input, which the backward pass keeps. Here the branch is added by the matrix product itself,
in the layer's precision, as autocast has it. The mathematics is PEFT's. A quantized layer's weight is unpacked for each
pass, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune_trainer.model.quantized import is_quantized, values_of


def fuse_lora(model: Any) -> None:
    """Make every plain LoRA layer of `model` compute itself this way wherever it can."""
    for module in _lora_linears(model):
        if "forward" not in vars(module):
            module.forward = partial(_forward, module, module.forward)


def unfuse_lora(model: Any) -> None:
    """Undo `fuse_lora`."""
    for module in _lora_linears(model):
        vars(module).pop("forward", None)


def _lora_linears(model: Any) -> Iterator[Any]:
    """PEFT has a class of its own for each kind of quantized layer."""
    for module in model.modules():
        if isinstance(module, LoraLinear) or (isinstance(module, LoraLayer) and is_quantized(module.get_base_layer())):
            yield module


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
    y: torch.Tensor = _FusedLinear.apply(flat, base, _precision(x), a, b, module.scaling[name], share)  # type: ignore[no-untyped-call]  # torch's
    return y.view(*x.shape[:-1], -1)


def _is_plain(module: Any, name: str, x: torch.Tensor) -> bool:
    """Whether PEFT would compute W x + scale B A dropout(x) here, in the precision of W: the input's, or autocast's."""
    base = module.base_layer
    packed = is_quantized(base)
    if (
        not (packed or type(base) is nn.Linear)
        or module.disable_adapters
        or module.merged
        or name in module.lora_variant
    ):
        return False
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    device = x.device.type
    half = torch.is_autocast_enabled(device)
    precision = _precision(x)
    return (
        type(a) is nn.Linear
        and a.bias is None
        and b.bias is None
        and type(dropout) in (nn.Dropout, nn.Identity)
        and not base.weight.requires_grad
        and a.weight.dtype is b.weight.dtype is torch.float32
        and (packed or base.weight.dtype is precision)
        and (half or x.dtype is precision)
        # In float32 GPUs are left to PEFT, which this was not measured against there.
        and (half or device == "cpu")
    )


def _precision(x: torch.Tensor) -> torch.dtype:
    """Of what is computed."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


class _FusedLinear(torch.autograd.Function):
    """x [T, I] -> [T, O], for the base layer's W [O, I], A [R, I] and B [O, R]; in the precision `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: Any,
        dtype: torch.dtype,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropped: float,
    ) -> torch.Tensor:
        x, a, b = (tensor.to(dtype) for tensor in (x, a, b))
        packed = is_quantized(base)
        weight = values_of(base, dtype) if packed else base.weight
        y = x @ weight.T if base.bias is None else torch.addmm(base.bias.to(dtype), x, weight.T)
        mask = None
        taken = x
        if dropped:
            taken, mask = torch.native_dropout(x, dropped, True)
        hidden = taken @ a.T
        y.addmm_(hidden, b.T, alpha=scale)
        ctx.save_for_backward(x, None if packed else weight, a, b, hidden, mask)
        ctx.base, ctx.scale, ctx.dropped = base, scale, dropped
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
            to_x = gradient @ (values_of(ctx.base, gradient.dtype) if weight is None else weight)
            if mask is None:
                to_x.addmm_(to_hidden, a)
            else:
                to_x.addcmul_(to_hidden @ a, mask.to(a.dtype), value=1 / (1 - ctx.dropped))
        # Autograd gives each the precision of what it is the gradient of.
        return to_x, None, None, to_a, to_b, None, None
