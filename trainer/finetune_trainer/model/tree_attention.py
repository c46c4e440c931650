"""Attention over a prefix tree, three ways that give the same result.

`dense` masks a full square and is the reference. `in_pieces` is for CPUs, where a mask costs the fast kernel: each node
attends causally to itself, all its descendants attend to it without a mask, and the pieces are merged by their
log-sum-exp. `flex` is for GPUs: one kernel that skips the blocks of the square in which nothing is attended to.

Shapes: query [1, H, T, D], key and value [1, K, T, D] with K dividing H; results [1, H, T, D].
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.model.prefix_tree import Pack

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  the log-sum-exp is to be had nowhere else
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


SMALLEST_FLEX_HEAD = 16
"""Head size below which FlexAttention has no kernel."""

_BLOCK = 128
"""FlexAttention's own."""


def tree_mask(pack: Pack, window: int | None = None) -> torch.Tensor:
    """bool [T, T]: whether token q (row) attends to token k (column).

    Args:
        pack: the tree.
        window: a token sees only this many, itself included; None for all of its path.
    """
    q = torch.arange(len(pack.span_end), device=pack.span_end.device)[:, None]
    mask = (q >= q.T) & (q < pack.span_end[None])
    if window is not None:
        place = pack.position_ids[0]
        mask &= place[:, None] - place[None] < window
    return mask


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: Any) -> torch.Tensor:
    """With a mask bool [T, T]."""
    key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def in_pieces(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scale: Any) -> Any:
    """By the fast CPU kernel, piece by piece."""
    key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
    return _InPieces.apply(query, key, value, pack, scale)  # type: ignore[no-untyped-call]  # torch's


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scale: Any) -> Any:
    """By FlexAttention."""
    kernel = _compiled_flex() if query.is_cuda else _flex()
    return kernel(query, key, value, block_mask=_block_mask(pack), scale=scale, enable_gqa=True)


class _InPieces(torch.autograd.Function):
    """The backward pass gives each piece the merged result and log-sum-exp, as ring attention does: its probabilities
    are then those of the whole, and the gradients of the pieces add up.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scale: Any) -> Any:
        # The layout that the model reshapes into anyway.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        # The kernel's own precision of log-sum-exps.
        precision = torch.promote_types(query.dtype, torch.float32)
        total = query.new_empty(query.shape[:1] + query.shape[2:3] + query.shape[1:2], dtype=precision).transpose(1, 2)
        for node in pack.nodes:
            own = slice(node.start, node.end)
            o, lse = _forward(query[:, :, own], key[:, :, own], value[:, :, own], 0.0, True, scale=scale)
            out[:, :, own], total[:, :, own] = o, lse
        for node in pack.nodes:
            if node.span_end > node.end:
                own, below = slice(node.start, node.end), slice(node.end, node.span_end)
                o, lse = _forward(query[:, :, below], key[:, :, own], value[:, :, own], 0.0, False, scale=scale)
                merged = torch.logaddexp(total[:, :, below], lse)
                out[:, :, below] *= (total[:, :, below] - merged).exp_().unsqueeze(-1)
                out[:, :, below] += o * (lse - merged).exp_().unsqueeze(-1)
                total[:, :, below] = merged
        ctx.save_for_backward(query, key, value, out, total)
        ctx.pack, ctx.scale = pack, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, out, total = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(tensor) for tensor in (query, key, value))

        def piece(q: slice, k: slice, causal: bool) -> Any:
            taken = (tensor[:, :, k] for tensor in (key, value))
            whole = (tensor[:, :, q] for tensor in (out, total))
            return _backward(gradient[:, :, q], query[:, :, q], *taken, *whole, 0.0, causal, scale=ctx.scale)

        for node in ctx.pack.nodes:
            own = slice(node.start, node.end)
            to_query[:, :, own], to_key[:, :, own], to_value[:, :, own] = piece(own, own, True)
        for node in ctx.pack.nodes:
            if node.span_end > node.end:
                own, below = slice(node.start, node.end), slice(node.end, node.span_end)
                for whole, where, part in zip(
                    (to_query, to_key, to_value), (below, own, own), piece(below, own, False), strict=True
                ):
                    whole[:, :, where] += part
        return to_query, to_key, to_value, None, None


def _repeated(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    times = heads // tensor.shape[1]
    # Many times faster than repeat_interleave.
    return tensor if times == 1 else tensor[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex() -> Any:
    import torch._dynamo.config as settings

    # One graph each for training and evaluation, short and long packs, each kind of head. Past the limit torch would
    # go on without the kernel, with all scores in memory; fullgraph lets it fail instead.
    settings.recompile_limit = max(settings.recompile_limit, 64)
    return torch.compile(_flex(), dynamic=True, fullgraph=True)


@functools.lru_cache(maxsize=1)
def _block_mask(pack: Pack) -> Any:
    """Made once per pack, for all layers.

    From the bounds of blocks: torch's own way writes the whole square down, tens of GB for one long row.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends = pack.span_end
    tokens, size = len(ends), _BLOCK

    def attends(_b: Any, _h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (q < ends[kv])

    starts = torch.arange(0, tokens, size, device=ends.device)
    padded = functional.pad(ends, (0, -tokens % size))
    blocks = padded.view(-1, size)
    # What is behind the last token has the end 0: nothing attends to it, and its block is never full.
    q, nearest, furthest = starts[:, None], blocks.amin(1), blocks.amax(1)
    touched = (starts < q + size) & (q < furthest)
    full = (starts + size <= q) & (q + size <= nearest) & (q + size <= tokens)
    return BlockMask.from_kv_blocks(
        *_listed(touched & ~full), *_listed(full), BLOCK_SIZE=size, mask_mod=attends, seq_lengths=(tokens, tokens)
    )


def _listed(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [Q, K] of blocks -> their number in each row int32 [1, 1, Q], and their columns first int32 [1, 1, Q, K]."""
    columns = wanted.int().argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]
