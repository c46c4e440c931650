"""A fused LoRA layer computes what PEFT's computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_trainer.model.fused_lora import _FusedLinear, fuse_lora, unfuse_lora


def adapted(*, bias: bool, dropout: float, **settings: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.SiLU(), nn.Linear(40, 16, bias=bias))
    config = LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=dropout, init_lora_weights=False, **settings)
    return get_peft_model(base, config)


def outcome(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Result, and gradients of the input and of all LoRA weights."""
    model.zero_grad()
    taken = x.clone().requires_grad_()
    result = model(taken)
    result.pow(3).sum().backward()
    assert taken.grad is not None
    return [result.detach(), taken.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Precisions of the layers that were fused."""
    found: list[torch.dtype] = []
    original = _FusedLinear.apply

    def apply(x: torch.Tensor, base: nn.Module, dtype: torch.dtype, *others: Any) -> Any:
        found.append(dtype)
        return original(x, base, dtype, *others)  # type: ignore[no-untyped-call]  # torch's

    monkeypatch.setattr(_FusedLinear, "apply", apply)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_result_and_gradients_are_those_of_peft(fused: list[torch.dtype], bias: bool, shape: tuple[int, ...]) -> None:
    model, x = adapted(bias=bias, dropout=0.0), torch.randn(shape)
    wanted = outcome(model, x)
    fuse_lora(model)
    found = outcome(model, x)
    assert fused == [torch.float32] * 2
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    unfuse_lora(model)
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, x), wanted, strict=True))
    assert len(fused) == 2


def half(model: Any) -> Any:
    """Frozen weights in bfloat16, as on a GPU."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_in_half_precision_it_is_as_exact_as_peft(fused: list[torch.dtype], bias: bool) -> None:
    model, x = half(adapted(bias=bias, dropout=0.0)), torch.randn(64, 24).to(torch.bfloat16).float()
    exact = half(adapted(bias=bias, dropout=0.0)).double()
    wanted = outcome(exact, x.double())

    def errors() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(model, x)
        assert all(each.dtype is torch.float32 for each in found[1:])
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]

    of_peft = errors()
    fuse_lora(model)
    of_ours = errors()
    assert fused == [torch.bfloat16] * 2
    assert all(ours < 1.5 * peft + 1e-3 for ours, peft in zip(of_ours, of_peft, strict=True))


class Upcasts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts what of 64 rows is made float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count: int = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.count += isinstance(made, torch.Tensor) and made.dtype is torch.float32 and made.shape[:1] == (64,)
        return made


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_in_half_precision_no_activation_becomes_float32(dropout: float) -> None:
    model, x = half(adapted(bias=False, dropout=dropout)), torch.randn(64, 24, dtype=torch.bfloat16)

    def upcasts() -> int:
        found: Any = Upcasts()
        with found, torch.autocast("cpu", torch.bfloat16):
            model(x.clone().requires_grad_()).sum().backward()
        return int(found.count)

    assert upcasts() > 0, "PEFT makes some"
    fuse_lora(model)
    assert upcasts() == 0


def test_dropout_drops_a_share_of_what_the_branch_sees() -> None:
    """The mean over many draws is the result without dropout; one draw's gradients are those of its own mask."""
    model, x = adapted(bias=False, dropout=0.3), torch.randn(3, 24)
    layer = model.base_model.model[0]
    fuse_lora(model)
    wanted = layer.eval()(x)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, wanted, rtol=0.1, atol=0.1)


def test_gradients_with_dropout_are_those_of_the_drawn_mask() -> None:
    model, x = adapted(bias=False, dropout=0.3), torch.randn(6, 24)
    layer = model.base_model.model[0].train()
    fuse_lora(model)
    taken = x.clone().requires_grad_()
    torch.manual_seed(1)
    layer(taken).pow(2).sum().backward()
    torch.manual_seed(1)
    dropped, _ = torch.native_dropout(x, 0.3, True)
    a, b = (part["default"].weight.detach().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    mask = (dropped / torch.where(x == 0, 1.0, x)).detach()
    again = x.clone().requires_grad_()
    (layer.base_layer(again) + (again * mask) @ a.T @ b.T * layer.scaling["default"]).pow(2).sum().backward()
    assert taken.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(taken.grad, again.grad, rtol=1e-4, atol=1e-4)
    for own, other in ((layer.lora_A["default"].weight.grad, a.grad), (layer.lora_B["default"].weight.grad, b.grad)):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_other_layers_stay_with_peft() -> None:
    model, x = adapted(bias=False, dropout=0.0, use_dora=True), torch.randn(5, 24)
    wanted = outcome(model, x)
    fuse_lora(model)
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, x), wanted, strict=True))


def test_a_switched_off_adapter_stays_off() -> None:
    model, x = adapted(bias=False, dropout=0.0), torch.randn(5, 24)
    fuse_lora(model)
    with model.disable_adapter():
        assert torch.equal(model(x), nn.Sequential(*(getattr(m, "base_layer", m) for m in model.base_model.model))(x))
