"""Which layers of a model a text reaches, measured: it runs through them and a gradient comes back.

Names do not tell it. A vision tower, cross-attention without an encoder and an indexer that only ranks have linear
layers like any other, and some kernels read a layer's weights without calling it. An adapter on any of them would stay
what it was at the start, and under DDP be fatal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.launch.failures import has_other_cause, quoted
from finetune_trainer.model.quantized import is_quantized

PROBE_TOKENS = 128
"""Tokens of the text: enough for layers that pool several of them, and less work than a training step."""


@dataclass(frozen=True)
class Reach:
    """Full paths of layers, by what became of them."""

    reached: frozenset[str]
    """A text runs through it, and a gradient comes back."""
    foreign: frozenset[str]
    """Linear layers of a class of their own that compute something else than W x + b."""


def reached_by_text(model: Any, layers: Mapping[str, nn.Module], ids: Sequence[int]) -> Reach:
    """What a short text reaches of `layers`.

    The model is left as it was, its weights get no gradient, and random numbers drawn are given back.

    Args:
        model: a causal language model without adapters, frozen, not wrapped.
        layers: the modules in question, by full path.
        ids: token ids of a real row; the first PROBE_TOKENS are run.

    Raises:
        JobError: ModelUnsupported, the model's own code fails on a text.
    """
    device = next(model.parameters()).device
    probes: dict[str, torch.Tensor] = {}
    foreign: set[str] = set()
    hooks = [
        module.register_forward_hook(_probing(path, probes, foreign), with_kwargs=True)
        for path, module in layers.items()
    ]
    training = model.training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            # As in training: kernels differ from those of inference.
            model.train()
            text = torch.tensor([list(ids[:PROBE_TOKENS])], device=device)
            logits = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
            # A sum of all would be flat where the head normalizes.
            logits.float().square().sum().backward()
    except Exception as error:  # Model code that nobody here has seen.
        if has_other_cause(error):
            raise
        raise JobError(
            Reason.MODEL_UNSUPPORTED,
            f"The model cannot be trained: its own code fails on a row of the data ({quoted(error)}). Name a model "
            "that transformers trains on texts of any length.",
        ) from error
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return Reach(frozenset(path for path, probe in probes.items() if probe.grad is not None), frozenset(foreign))


def _probing(path: str, probes: dict[str, torch.Tensor], foreign: set[str]) -> Callable[..., Any]:
    """A hook that adds a zero to the layer's output, whose gradient tells whether the output matters."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, torch.Tensor) or not first.is_floating_point():
            return output
        usual = is_quantized(module) or type(module).forward is nn.Linear.forward
        own = isinstance(module, nn.Linear) and not usual
        if own and not _is_linear(module, arguments, named, output):
            foreign.add(path)
        if path not in probes:
            probes[path] = torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=True)
        added = first + probes[path]
        return (added, *output[1:]) if isinstance(output, tuple) else added

    return hook


def _is_linear(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> bool:
    """Whether this call computed W x + b of its one argument."""
    if named or len(arguments) != 1 or isinstance(output, tuple) or arguments[0].shape[-1] != module.in_features:
        return False
    with torch.no_grad():
        expected = functional.linear(arguments[0], module.weight, module.bias)
    return expected.shape == output.shape and (output.is_meta or torch.allclose(expected, output, rtol=1e-2, atol=1e-3))
