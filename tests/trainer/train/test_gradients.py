"""Gradients in one vector are those of the parameters, and are clipped as torch clips them."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.train.gradients import Gradients


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 300), (2000, 8), (1,), (8, 512, 64)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def backward(trained: list[torch.nn.Parameter]) -> torch.Tensor:
    loss = torch.stack([(parameter**3).sum() for parameter in trained]).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's
    return loss.detach()


def test_a_backward_pass_adds_to_the_vector_and_zero_begins_anew() -> None:
    trained, others = parameters(), parameters()
    gradients = Gradients(trained)
    backward(others)
    for _ in range(2):
        gradients.zero()
        loss = backward(trained)
        assert float(gradients.reduce(loss)) == float(loss)
        for a, b in zip(trained, others, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("most", [1.0, 1e9])
def test_the_gradient_is_clipped_as_torch_clips_it(most: float) -> None:
    trained, others = parameters(), parameters()
    gradients = Gradients(trained)
    for each in (trained, others):
        backward(each)
    wanted = torch.nn.utils.clip_grad_norm_(others, most)
    assert float(gradients.clip(most)) == pytest.approx(float(wanted), rel=1e-6)
    for a, b in zip(trained, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_a_bound_nothing_is_clipped() -> None:
    trained, others = parameters(), parameters()
    gradients = Gradients(trained)
    for each in (trained, others):
        backward(each)
    assert float(gradients.clip(0.0)) > 1.0
    for a, b in zip(trained, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0.0, atol=0.0)


def test_the_norm_of_millions_of_values_is_exact() -> None:
    """Over one vector in float32 it is off by 1e-4 on some CPUs."""
    trained = [torch.nn.Parameter(torch.zeros(8, 2048)) for _ in range(300)]
    gradients = Gradients(trained)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained:
        assert parameter.grad is not None
        parameter.grad.copy_(torch.randn(8, 2048, generator=generator))
    exact = torch.cat([each.grad.flatten() for each in trained if each.grad is not None]).double().norm()
    assert float(gradients.clip(1e9)) == pytest.approx(float(exact), rel=1e-6)
