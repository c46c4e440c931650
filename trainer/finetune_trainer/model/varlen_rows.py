"""Attention of rows that share nothing, on GPUs: FlashAttention's kernel for sequences of any length, side by side.

Shapes as in `tree_attention.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.model.tree_attention import Scores, Sight

_LARGEST_HEAD = 256
_FIRST_CAPABILITY = 8, 0
"""Of CUDA devices that FlashAttention 2 runs on."""


def takes_side_by_side(
    query: torch.Tensor, value: torch.Tensor, pack: Pack, sight: Sight | None, scores: Scores
) -> bool:
    """Whether `side_by_side` is there for this: whole rows, in half precision, on a device that has the kernel."""
    size = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= _LARGEST_HEAD
        and not pack.before
        and sight is None
        and scores.plain
        and all(node.span_end == node.end for node in pack.nodes)
        and _has_kernel(query.device)
    )


def side_by_side(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, _: Sight | None, scores: Scores
) -> Any:
    """Each row with itself, causally; scores are plain: no gradient comes back through the kernel's log-sum-exp."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = _ends(pack), pack.longest
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    out: Any = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scores.scale, window_size=(-1, 0), enable_gqa=True
    )
    return out.transpose(0, 1)[None]


@functools.lru_cache(maxsize=4)
def _ends(pack: Pack) -> torch.Tensor:
    """Where rows begin and end, int32 [rows + 1]; made once per pack, for all layers."""
    ends = [0, *(node.end for node in pack.nodes)]
    return torch.tensor(ends, dtype=torch.int32, device=pack.input_ids.device)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
