"""The frozen base in 4 or 8 bits, by bitsandbytes: its linear layers keep codes, and are computed with their values.

A layer's weight is unpacked for a forward or backward pass and thrown away; nothing but the codes is kept. That is what
bitsandbytes does of nf4 by itself. Of int8 it does not: LLM.int8() rounds the layer's input as well, by columns that
hold a large value anywhere in the batch, so a row's logits change with what lies beside it (by 2.4 where a SmolLM2 was
given 24 tokens more). Here the input stays as it is: rows may be laid out together, and gradients are those of what was
computed. https://arxiv.org/abs/2305.14314 (nf4), https://arxiv.org/abs/2208.07339 (int8).
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Hashable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from finetune_api.outcome import Reason
from finetune_api.training import Quantization
from finetune_trainer.errors import JobError

_LARGEST_CODE = 127
_SMALL_SHARE = 0.5
"""Of the weights; a model of which less is quantized takes about as much memory as before, which has to be said."""


def import_bitsandbytes() -> None:
    """Import it before PEFT does so, without torch's compiler: bitsandbytes has four functions compiled while it is
    imported, and loading what that takes costs every process two seconds.
    """
    compiler = torch.compile
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    try:
        # Not everywhere is it there; whoever asks for a quantization is told so.
        with suppress(ImportError):
            import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler


def settings(quantization: Quantization, dtype: torch.dtype, skeleton: Any | None) -> Any:
    """transformers' configuration for loading a model so.

    Args:
        quantization: how.
        dtype: what is computed in.
        skeleton: the model without weights; None where there is none, and only what transformers knows is left out.
    """
    from transformers import BitsAndBytesConfig

    skipped = None if skeleton is None else _left_out(skeleton)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=skipped,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        # The scales are quantized too, as QLoRA's are: 4.13 bits per weight in place of 4.5.
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def left_out(model: Any) -> list[str]:
    """What transformers has to be told to leave out when it quantizes the base of `model` as it was; often nothing."""
    found = getattr(model.config, "quantization_config", None)
    return list(getattr(found, "llm_int8_skip_modules", None) or [])


def published_method(config: Any) -> str | None:
    """How a model's publisher has quantized it, in transformers' words; None where it is in floats."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def refuse_quantized_already(config: Any, name: str) -> None:
    """Refuse to quantize what its publisher has quantized.

    Raises:
        JobError: InvalidSpec.
    """
    method = published_method(config)
    if method is None:
        return
    raise JobError(
        Reason.INVALID_SPEC,
        f"{name} is quantized already ({method}): remove quantization to train on it as it "
        "is, or name the model that it was made from.",
    )


def compute_with_values(model: Any) -> None:
    """Make every quantized layer of `model` compute with its weight's values, forwards and backwards."""
    for layer in _quantized_layers(model):
        layer.forward = partial(_forward, layer)


def is_quantized(layer: Any) -> bool:
    """Whether `layer` is a linear layer that keeps codes in the place of its weight."""
    library: Any = sys.modules.get("bitsandbytes")  # Without it nobody has made such a layer.
    return library is not None and isinstance(layer, (library.nn.Linear4bit, library.nn.Linear8bitLt))


def values_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, I] that a quantized layer's codes stand for."""
    if _is_4bit(layer):
        from bitsandbytes.functional import dequantize_4bit

        unpacked: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return unpacked.to(dtype)
    # The scale of each row is its largest value. It is with the weight until bitsandbytes' own first pass.
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    values: torch.Tensor = layer.weight.data.to(torch.float32) * (scales.view(-1, 1) / _LARGEST_CODE)
    return values.to(dtype)


def quantization_notices(model: Any, quantization: Quantization, name: str) -> list[str]:
    """What a user should know of how much was quantized.

    Raises:
        JobError: ModelUnsupported, nothing was.
    """
    layers = list(_quantized_layers(model))
    held = sum(layer.in_features * layer.out_features for layer in layers)
    quantized = {id(parameter) for layer in layers for parameter in layer.parameters()}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in quantized)
    if not layers:
        raise JobError(
            Reason.MODEL_UNSUPPORTED,
            f"{name} has no linear layers that bitsandbytes quantizes: remove quantization, or name another model.",
        )
    if held < _SMALL_SHARE * (held + others):
        told = (
            f"quantization: {quantization} covers {held / (held + others):.0%} of the weights of {name}; embeddings, "
            "output head and stacked experts stay as they are, so little memory is saved."
        )
        return [told]
    return []


def _left_out(skeleton: Any) -> list[str] | None:
    """Names, or ends of them, of what stays as it is: what transformers leaves out, and layers whose weights the code
    around them reads itself (Mamba's `dt_proj`, the precision of an indexer's `weights_proj`): it would find codes.

    None stands for transformers' own choice.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    found: set[str] = set()
    for module in skeleton.modules():
        children = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
        code = _code_of(cast("Hashable", type(module))) if children else ""
        # With the dot before it, the end of a name stands for that layer alone.
        found |= {f".{name}" for name in children if re.search(rf"\bself\.{re.escape(name)}\.(weight|bias)\b", code)}
    return sorted({*get_keys_to_not_convert(skeleton), *found}) if found else None


@functools.cache
def _code_of(kind: Hashable) -> str:
    """The source of a model's own classes among those of a module; nothing where it cannot be had."""
    found = []
    for each in inspect.getmro(cast("type", kind)):
        if not each.__module__.startswith("torch.") and each.__name__ != "PreTrainedModel":
            with suppress(OSError, TypeError):
                found.append(inspect.getsource(each))
    return "\n".join(found)


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _FrozenLinear.apply(flat, layer, _computed_in(x))  # type: ignore[no-untyped-call]  # torch's
    return y.view(*x.shape[:-1], -1)


def _computed_in(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _FrozenLinear(torch.autograd.Function):
    """x [T, I] -> [T, O]; keeps nothing of a weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, dtype: torch.dtype) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        weight, x = values_of(layer, dtype), x.to(dtype)
        return x @ weight.T if layer.bias is None else torch.addmm(layer.bias.to(dtype), x, weight.T)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ values_of(ctx.layer, ctx.dtype), None, None


def _is_4bit(layer: Any) -> bool:
    return hasattr(layer, "quant_state")


def _quantized_layers(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if is_quantized(module))
