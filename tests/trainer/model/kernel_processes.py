"""What Liger's kernels are found to stand for in models of many architectures, as JSON on standard output."""

from __future__ import annotations

from tests.trainer.model.triton_on_cpu import interpret  # isort: skip  (before anything that has kernels)

import json
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from finetune_trainer.model import adapted_model, fused_kernels
from finetune_trainer.model.batch import pad
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.gate import Gate
from finetune_trainer.train.sample import sample_of
from tests.trainer.train.test_gate import BATCHING, ready, rows, tiny

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def main(cases: dict[str, dict[str, Any]]) -> None:
    """By case: what was replaced, how far result and gradients are from the model's own, in each precision."""
    interpret()
    for module in (fused_kernels, adapted_model):
        module.can_fuse = lambda _device: True  # type: ignore[attr-defined]
    fused_kernels.fuse_kernels(nn.ModuleList(_OTHERS), torch.device("cpu"), torch.float32)
    found = {kind: _measured(kind, settings) for kind, settings in cases.items()}
    print(json.dumps({**found, "others": [type(module).__name__ for module in _OTHERS if _is_replaced(module)]}))


class _Unit(nn.Module):
    """What Liger's unit computes."""

    def __init__(self, **settings: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))
        vars(self).update(settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class _Clamped(_Unit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x).clamp(-7, 7)
        return self.down_proj(functional.silu(self.gate_proj(x)) * up)  # type: ignore[no-any-return]


class _Dropped(_Unit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(super().forward(x), 0.1, training=self.training)


class _OfAnotherLayer(_Unit):
    """The first of its class has no limit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x).clamp(-self.limit, self.limit)  # type: ignore[operator]
        return self.down_proj(functional.silu(self.gate_proj(x)) * up)  # type: ignore[no-any-return]


class _GatedNorm(nn.Module):
    """As those of state-space layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(16), requires_grad=False), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * functional.silu(gate)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


_OTHERS = (
    _Unit(),
    _Clamped(),
    _Dropped(),
    _OfAnotherLayer(limit=1e9),
    _OfAnotherLayer(limit=7.0),
    _GatedNorm(),
)


def _is_replaced(module: nn.Module) -> bool:
    return "forward" in vars(module)


def _measured(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        model = ready(tiny(kind, dropout=0.0, **settings))
        model.base.to(dtype)
        model.dtype = dtype
        for parameter in model.trained:
            parameter.data = parameter.data.float()
        model.peft.eval()
        batches = [pad(row, 0) for row in rows(7, 11, shared=5)]
        own = _outcome(model, batches)
        model.fuse()
        kernels = model._kernels
        assert kernels is not None
        replaced = len(kernels.norms), len(kernels.gated), kernels.rotary is not None
        fused = _outcome(model, batches)
        model.unfuse()
        again = _outcome(model, batches)
        found[name] = {
            "replaced": replaced,
            "apart": [float((b - a).norm() / a.norm()) for a, b in zip(own, fused, strict=True)],
            "undone": all(torch.equal(a, b) for a, b in zip(own, again, strict=True)),
        }
    verdict = Gate(ready(tiny(kind, dropout=0.0, **settings)), Ranks()).choose(
        sample_of(rows(7, 11, shared=5), 64), BATCHING
    )
    found["gate"] = [verdict.layout.value, verdict.refused]
    return found


def _outcome(model: Any, batches: list[Any]) -> list[torch.Tensor]:
    """Loss, and the whole gradient."""
    model.peft.zero_grad()
    loss = model.backward(batches)
    return [loss.reshape(1), torch.cat([each.grad.flatten() for each in model.trained if each.grad is not None])]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
