"""Attention over a prefix tree on GPUs: one FlexAttention kernel that skips blocks in which nothing is attended to.

Shapes as in `tree_attention.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.model.tree_attention import Scores, Sight

SMALLEST_HEAD = 16
"""Head size below which FlexAttention has no kernel."""

_BLOCK = 128
"""FlexAttention's own."""

_GRAPHS = 64


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, sight: Sight | None, scores: Scores
) -> Any:
    """By FlexAttention; scores may have a cap and sinks, but no bias and no dropout."""
    from torch.nn.attention.flex_attention import AuxRequest

    kernel = _compiled() if query.is_cuda else _flex()
    settings = {"block_mask": _block_mask(pack, sight), "scale": scores.scale, "enable_gqa": True}
    if scores.cap is not None:
        settings["score_mod"] = _capped(scores.cap)
    if scores.sinks is None:
        return kernel(query, key, value, **settings)
    out, found = kernel(query, key, value, return_aux=AuxRequest(lse=True), **settings)
    # One more score, whose value is 0, only takes its share of the result.
    kept = torch.sigmoid(found.lse - scores.sinks.to(found.lse.dtype)[None, :, None])
    return out * kept.unsqueeze(-1).to(out.dtype)


@functools.cache
def _capped(cap: float) -> Any:
    def modify(score: Any, _b: Any, _h: Any, _q: Any, _kv: Any) -> Any:
        return torch.tanh(score / cap) * cap

    return modify


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled() -> Any:
    # One graph each for training and evaluation, short and long packs, each kind of head, on whatever thread: layers
    # that are computed again are so on the backward pass's own. Past the limit torch would go on without the kernel,
    # with all scores in memory; fullgraph lets it fail instead.
    compiled: Any = torch.compile
    return compiled(_flex(), dynamic=True, fullgraph=True, recompile_limit=_GRAPHS)


@functools.lru_cache(maxsize=4)
def _block_mask(pack: Pack, sight: Sight | None = None) -> Any:
    """Made once per pack, for all layers that see alike.

    From the bounds of blocks: torch's own way writes the whole square down, tens of GB for one long row.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # Keys have `before` others in front, which all queries see: their span ends behind the pack.
    tokens, keys, size = pack.tokens, pack.before + pack.tokens, _BLOCK
    ends = functional.pad(pack.span_end + pack.before, (pack.before, 0), value=keys)
    place, key_place = pack.position_ids[0], pack.key_places
    # As a tensor: a number would be compiled anew whenever it is another.
    before = torch.tensor(pack.before, device=ends.device)

    def attends(_b: Any, _h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q + before) & (q + before < ends[kv])

    def sees(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return attends(b, h, q, kv) & sight.sees(b, h, place[q], key_place[kv])  # type: ignore[union-attr]  # used with one

    starts = torch.arange(0, keys, size, device=ends.device)
    blocks = functional.pad(ends, (0, -keys % size)).view(-1, size)
    # What is behind the last token has the end 0: nothing attends to it, and its block is never full.
    q, nearest, furthest = torch.arange(0, tokens, size, device=ends.device)[:, None], blocks.amin(1), blocks.amax(1)
    last = q + pack.before + size
    touched = (starts < last) & (last - size < furthest)
    full = (starts + size <= last - size) & (last <= nearest) & (last <= keys)
    if sight is not None:
        full = torch.zeros_like(full)
        if sight.reach is not None:
            # Places from the first query to the last key of a block, at the least; the last place once more behind it.
            nearest_query, furthest_key = (
                functional.pad(places[None].double(), (0, -len(places) % size), mode="replicate").view(-1, size)
                for places in (place, key_place)
            )
            touched &= nearest_query.amin(1)[:, None] - furthest_key.amax(1) < sight.reach
    return BlockMask.from_kv_blocks(
        *_listed(touched & ~full),
        *_listed(full),
        BLOCK_SIZE=size,
        mask_mod=attends if sight is None else sees,
        seq_lengths=(tokens, keys),
    )


def _listed(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [Q, K] of blocks -> their number in each row int32 [1, 1, Q], and their columns first int32 [1, 1, Q, K]."""
    columns = wanted.int().argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]
