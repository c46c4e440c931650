"""FlexAttention beside attention with a dense mask, on one pack, forwards and backwards.

On a GPU packs go through FlexAttention, compiled, which no CPU can check: there it runs as it is, and forwards only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.devices import give_back, peak_memory, reset_peak, wait_for
from finetune_trainer.model.flex_tree import flex
from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.model.tree_attention import Scores, dense, tree_mask

TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Norm of the difference, relative to that of the dense result, which rounding makes at most. bfloat16 keeps 8 bits,
and both kernels round their probabilities to it: some 5e-3 is usual."""

_REPEATS = 5


@dataclass(frozen=True)
class KernelTimes:
    """Of one kernel, in seconds; medians of five runs."""

    first: float
    """The first run of all, compilation included."""
    new_pack: float
    """Forwards, on a pack that is seen for the first time; flex makes its block mask then."""
    forward: float
    """On a pack that was seen before: what every layer but a pack's first takes."""
    backward: float | None
    """None where there is no backward pass."""
    peak_bytes: int | None
    """Most memory by tensors, above what inputs and the dense mask take; None on a CPU."""


@dataclass(frozen=True)
class Comparison:
    """Both kernels on the same numbers."""

    tokens: int
    nodes: int
    heads: tuple[int, int, int]
    """Of queries, of keys, and the size of each."""
    dtype: torch.dtype
    times: dict[str, KernelTimes]
    differences: dict[str, float]
    """Of the result and of each gradient, as the tolerance."""

    @property
    def agrees(self) -> bool:
        """Whether all differences are within the tolerance; NaN is not."""
        return all(difference <= TOLERANCES[self.dtype] for difference in self.differences.values())


_Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Pack], torch.Tensor]


def compare_kernels(pack: Pack, config: Any, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Run both kernels on random numbers.

    Args:
        pack: T tokens.
        config: the language model's, which gives heads and their size.
        device: where to run.
        dtype: bfloat16 or float32.
    """
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    generator = torch.Generator(device).manual_seed(0)
    learns = device.type == "cuda"

    def drawn(count: int) -> torch.Tensor:
        shape = (1, count, pack.tokens, size)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(learns)

    query, key, value = drawn(heads), drawn(kv_heads), drawn(kv_heads)
    upstream = torch.randn(query.shape, generator=generator, device=device, dtype=dtype)
    pack, scores = pack.to(device), Scores(size**-0.5)
    mask = tree_mask(pack)
    kernels: dict[str, _Kernel] = {
        "dense": lambda q, k, v, _: dense(q, k, v, mask, scores),
        "flex": lambda q, k, v, seen: flex(q, k, v, seen, None, scores),
    }
    times, results = {}, {}
    for name, kernel in kernels.items():
        times[name], results[name] = _run(kernel, (query, key, value), upstream, pack)
    names = ("result", "gradient of queries", "gradient of keys", "gradient of values")
    differences = {
        what: float((a.float() - b.float()).norm() / b.float().norm())
        for what, a, b in zip(names, results["flex"], results["dense"], strict=False)
    }
    return Comparison(pack.tokens, len(pack.nodes), (heads, kv_heads, size), dtype, times, differences)


def _run(
    kernel: _Kernel, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], upstream: torch.Tensor, pack: Pack
) -> tuple[KernelTimes, list[torch.Tensor]]:
    """Times, and the result with the gradients of the inputs, if there are any."""
    device, learns = upstream.device, inputs[0].requires_grad

    def once(seen: Pack) -> tuple[float, float, list[torch.Tensor]]:
        wait_for(device)
        began = time.perf_counter()
        out = kernel(*inputs, seen)
        wait_for(device)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(out, inputs, upstream) if learns else ()
        wait_for(device)
        return middle - began, time.perf_counter() - middle, [out.detach(), *gradients]

    give_back(device)
    forward, backward, results = once(pack)
    first = forward + backward
    reset_peak(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    # An equal pack that is another object has everything made anew.
    new = [once(replace(pack))[0] for _ in range(_REPEATS)]
    pack = replace(pack)
    once(pack)
    runs = [once(pack)[:2] for _ in range(_REPEATS)]
    memory = peak_memory(device)
    forwards, backwards = zip(*runs, strict=True)
    times = KernelTimes(
        first,
        sorted(new)[_REPEATS // 2],
        sorted(forwards)[_REPEATS // 2],
        sorted(backwards)[_REPEATS // 2] if learns else None,
        memory.allocated - before if memory else None,
    )
    return times, results
