"""Layers that no text reaches are found by running some, whatever keeps the gradient from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune_trainer.model.reached import unreached_layers


class Block(nn.Module):
    """A layer that text reaches in part."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.indexer = nn.Linear(8, 8)
        self.encoder_attention = nn.Linear(8, 8)
        self.read_directly = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        order = self.indexer(states).argsort(dim=-1)
        states = self.used(states).gather(-1, order) @ self.read_directly.weight
        return states + self.experts[1](states)  # type: ignore[no-any-return]  # torch's


class Images(Block):
    """A layer of the same list that only images go through."""


class Decoder(nn.Module):
    """A language model with a tower beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.layers = nn.ModuleList([Block(), Images(), Block()])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = states if isinstance(layer, Images) else layer(states)
        return states


def adapted() -> Any:
    torch.manual_seed(0)
    base = Decoder()
    targets = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    return get_peft_model(base, LoraConfig(r=2, target_modules=targets))


def test_what_no_text_reaches_is_named_and_experts_are_not() -> None:
    model = adapted()
    found = unreached_layers(model, lambda: model(torch.ones(1, 3, 8)).sum().backward())
    names = ("indexer", "encoder_attention", "read_directly")
    images = [f"layers.1.{name}" for name in ("used", *names, "experts.0", "experts.1", "experts.2")]
    others = [f"layers.{layer}.{name}" for layer in (0, 2) for name in names]
    assert sorted(found) == sorted([*images, *others, "tower.0", "tower.1"])


def test_nothing_is_left_behind() -> None:
    model = adapted()
    unreached_layers(model, lambda: model(torch.ones(1, 3, 8)).sum().backward())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_pass_leaves_nothing_behind_either() -> None:
    model = adapted()

    def fails() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        unreached_layers(model, fails)
    assert not any(module._forward_hooks for module in model.modules())
