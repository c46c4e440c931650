"""A plugin for vLLM on a CPU: a mixture's experts, with their adapters, computed by PyTorch.

With LoRA vLLM computes experts by a Triton kernel alone, and Triton has none for CPUs. What is asked of a server here
(which adapter is loaded, under which names, with which scaling, where in the model) is all outside of that kernel and
stays vLLM's own. It runs in the server's environment, found by its entry point on PYTHONPATH.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Put `_apply` in the place of the kernel's caller; vLLM calls this in each of its processes."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts  # type: ignore[import-not-found]

    TritonExperts.apply = _apply


def _apply(
    self: Any,
    output: Any,
    hidden_states: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    *_args: Any,
    **_kwargs: Any,
) -> None:
    """Fill `output` [T, H]: `w1` [E, 2 I, H] holds gate and up, `w2` [E, H, I] down; K experts of each token."""
    import torch
    from torch.nn import functional

    context = self._lora_context
    adapters = None if context is None else context.punica_wrapper.token_lora_indices[: len(hidden_states)]
    found = torch.zeros_like(hidden_states)
    for expert in range(len(w1)):
        tokens, places = torch.where(topk_ids == expert)
        x = hidden_states[tokens]
        inner = x @ w1[expert].T
        if adapters is not None:
            inner += _delta(x, expert, adapters[tokens], context.w13_lora_a_stacked, context.w13_lora_b_stacked)
        gate, up = inner.chunk(2, dim=-1)
        y = functional.silu(gate) * up
        outer = y @ w2[expert].T
        if adapters is not None:
            outer += _delta(y, expert, adapters[tokens], context.w2_lora_a_stacked, context.w2_lora_b_stacked)
        found.index_add_(0, tokens, outer * topk_weights[tokens, places, None].to(outer.dtype))
    output.copy_(found)


def _delta(x: Any, expert: int, adapters: Any, a: Any, b: Any) -> Any:
    """What the adapters add to an expert's product of `x` [N, I]: [N, O]. `adapters` [N] is -1 where there is none."""
    import torch

    size = sum(part.shape[2] for part in b)
    found = x.new_zeros(len(x), size)
    for adapter in adapters.unique().tolist():
        if adapter >= 0:
            rows = adapters == adapter
            parts = [
                x[rows] @ one[adapter, expert].T @ other[adapter, expert].T for one, other in zip(a, b, strict=True)
            ]
            found[rows] = torch.cat(parts, dim=-1)
    return found
