"""Attention over a prefix tree, in ways that give the same result.

`dense` masks a full square and is the reference. `in_pieces` and `by_path` compute only what is attended to, node by
node: the first by the fast kernel for CPUs, where a mask would cost it (each node attends causally to itself, all its
descendants attend to it without a mask, and the pieces are merged by their log-sum-exp); the second by whatever a layer
does to its scores. `flex_tree.py` is for GPUs.

Shapes: query [1, H, T, D], key [1, K, S, D] and value [1, K, S, E] with K dividing H; results [1, H, T, E]. S is T, and
more by what lies before the pack (`Pack.before`), which all of it sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.model.prefix_tree import Node, Pack

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  the log-sum-exp is to be had nowhere else
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


@dataclass(frozen=True, eq=False)
class Sight:
    """What a layer lets a token see of its own path, by places in the row. Equal to itself alone."""

    sees: Callable[..., torch.Tensor]
    """(row of the batch, head, places of queries, places of keys) -> bool, as transformers writes its masks."""
    reach: int | None
    """A token sees none that is this many or more before it; None for no such bound."""


@dataclass(frozen=True)
class Scores:
    """What a layer does with its scores, in this order; and what attends to nothing."""

    scale: float
    cap: float | None = None
    """They end up between minus and plus this."""
    bias: torch.Tensor | None = None
    """Added: [1, 1 or H, 1 or T, S]."""
    sinks: torch.Tensor | None = None
    """[H]: a score of each head beside those of the tokens, whose share is lost."""
    dropout: float = 0.0
    """Share of the probabilities that is dropped."""

    @property
    def plain(self) -> bool:
        """Whether they are only scaled."""
        return self.cap is None and self.bias is None and self.sinks is None and not self.dropout


def tree_mask(pack: Pack, sight: Sight | None = None) -> torch.Tensor:
    """bool [T, S]: whether token q (row) attends to token k (column); without a sight, to all of its path."""
    q = torch.arange(pack.tokens, device=pack.span_end.device)[:, None]
    mask = functional.pad((q >= q.T) & (q < pack.span_end[None]), (pack.before, 0), value=True)
    if sight is not None:
        mask &= sight.sees(0, 0, pack.position_ids[0][:, None], pack.key_places[None])
    return mask


_kept_mask = functools.lru_cache(maxsize=4)(tree_mask)
"""Made once per pack, for all layers that see alike."""


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scores: Scores) -> Any:
    """With a mask bool [T, S]."""
    return _masked(query, _repeated(key, query), _repeated(value, query), mask, scores.bias, scores)


def by_path(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, sight: Sight | None, scores: Scores
) -> torch.Tensor:
    """Node by node, each with the keys of its path that any of its tokens sees."""
    key, value = _repeated(key, query), _repeated(value, query)
    parts = []
    for own, spans, mask in _paths(pack, sight):
        keys, values = (torch.cat([tensor[:, :, span] for span in spans], 2) for tensor in (key, value))
        bias = scores.bias
        if bias is not None:
            bias = torch.cat([bias[..., span] for span in spans], -1)
            bias = bias[:, :, own] if bias.shape[2] > 1 else bias
        parts.append(_masked(query[:, :, own], keys, values, mask, bias, scores))
    return torch.cat(parts, 2)


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, sight: Sight | None, scores: Scores
) -> Any:
    """All at once, masked, which is the fastest for few tokens."""
    return dense(query, key, value, _kept_mask(pack, sight), scores)


def in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, _: Sight | None, scores: Scores
) -> torch.Tensor:
    """By the fast CPU kernel, piece by piece; scores may have sinks and nothing else, and there is no sight."""
    size = value.shape[-1]
    # The kernel wants one size: zeros more change no score, and what they yield is cut off.
    widest = max(query.shape[-1], size)
    query, key, value = (functional.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in (query, key, value))
    out: torch.Tensor = _InPieces.apply(
        query, _repeated(key, query), _repeated(value, query), scores.sinks, pack, scores.scale
    )  # type: ignore[no-untyped-call]  # torch's
    return out[..., :size]


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    scores: Scores,
) -> torch.Tensor:
    if scores.cap is None and scores.sinks is None:
        merged = mask if bias is None else bias.to(query.dtype).masked_fill(~mask, -torch.inf)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=merged, dropout_p=scores.dropout, scale=scores.scale
        )
    found = query @ key.transpose(2, 3) * scores.scale
    if scores.cap is not None:
        found = torch.tanh(found / scores.cap) * scores.cap
    if bias is not None:
        found = found + bias
    found = found.masked_fill(~mask, -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.to(found.dtype)[None, :, None, None]
        found = torch.cat([found, sinks.expand(*found.shape[:3], 1)], -1)
    shares = functional.softmax(found, -1, dtype=torch.promote_types(found.dtype, torch.float32)).to(value.dtype)
    shares = functional.dropout(shares[..., : key.shape[2]], scores.dropout)
    return shares @ value


@functools.lru_cache(maxsize=4)
def _paths(pack: Pack, sight: Sight | None) -> list[tuple[slice, list[slice], torch.Tensor]]:
    """Of each node its tokens, the runs of tokens that they see, and which of these each sees, bool [n, P]; made once
    per pack, for all layers.
    """
    place = pack.key_places
    found = []
    ancestors: list[Node] = []
    for node in pack.key_nodes:
        while ancestors and ancestors[-1].span_end <= node.start:
            ancestors.pop()
        ancestors.append(node)
        if node.start < pack.before:
            continue
        depth = sum(other.end - other.start for other in ancestors[:-1])
        first = 0 if sight is None or sight.reach is None else max(0, depth - sight.reach + 1)
        spans: list[slice] = []
        for other in ancestors:
            size = other.end - other.start
            start = min(first, size)
            first -= start
            if start == size:
                continue
            if spans and spans[-1].stop == other.start:
                spans[-1] = slice(spans[-1].start, other.end)
            else:
                spans.append(slice(other.start + start, other.end))
        seen = torch.cat([torch.arange(span.start, span.stop, device=place.device) for span in spans])
        q = torch.arange(node.start, node.end, device=place.device)[:, None]
        mask = seen[None] <= q
        if sight is not None:
            mask = mask & sight.sees(0, 0, place[q], place[seen][None])
        found.append((slice(node.start - pack.before, node.end - pack.before), spans, mask))
    return found


@functools.lru_cache(maxsize=4)
def _pieces(pack: Pack) -> tuple[list[tuple[slice, slice]], list[tuple[slice, slice]]]:
    """(queries, keys) of each node with itself, and of all its descendants with it."""
    before, nodes = pack.before, pack.key_nodes
    return (
        [(slice(n.start - before, n.end - before), slice(n.start, n.end)) for n in nodes if n.start >= before],
        [(slice(n.end - before, n.span_end - before), slice(n.start, n.end)) for n in nodes if n.span_end > n.end],
    )


class _InPieces(torch.autograd.Function):
    """The backward pass gives each piece the merged result and log-sum-exp, as ring attention does: its probabilities
    are then those of the whole, and the gradients of the pieces add up. A sink is one more key, whose value is 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        pack: Pack,
        scale: float,
    ) -> Any:
        # The layout that the model reshapes into anyway.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        # The kernel's own precision of log-sum-exps.
        precision = torch.promote_types(query.dtype, torch.float32)
        total = query.new_empty(query.shape[:1] + query.shape[2:3] + query.shape[1:2], dtype=precision).transpose(1, 2)
        itself, others = _pieces(pack)
        for q, own in itself:
            o, lse = _forward(query[:, :, q], key[:, :, own], value[:, :, own], 0.0, True, scale=scale)
            out[:, :, q], total[:, :, q] = o, lse
        for below, own in others:
            o, lse = _forward(query[:, :, below], key[:, :, own], value[:, :, own], 0.0, False, scale=scale)
            merged = torch.logaddexp(total[:, :, below], lse)
            out[:, :, below] *= (total[:, :, below] - merged).exp_().unsqueeze(-1)
            out[:, :, below] += o * (lse - merged).exp_().unsqueeze(-1)
            total[:, :, below] = merged
        if sinks is not None:
            merged = torch.logaddexp(total, sinks.to(precision)[None, :, None])
            out *= (total - merged).exp_().unsqueeze(-1)
            total = merged
        ctx.save_for_backward(query, key, value, sinks, out, total)
        ctx.pack, ctx.scale = pack, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, sinks, out, total = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(tensor) for tensor in (query, key, value))

        def piece(q: slice, k: slice, causal: bool) -> Any:
            taken = (tensor[:, :, k] for tensor in (key, value))
            whole = (tensor[:, :, q] for tensor in (out, total))
            return _backward(gradient[:, :, q], query[:, :, q], *taken, *whole, 0.0, causal, scale=ctx.scale)

        itself, others = _pieces(ctx.pack)
        # What lies before the pack sees nothing of itself here.
        for to_before in (to_key, to_value):
            to_before[:, :, : ctx.pack.before] = 0
        for q, own in itself:
            to_query[:, :, q], to_key[:, :, own], to_value[:, :, own] = piece(q, own, True)
        for below, own in others:
            for whole, where, part in zip(
                (to_query, to_key, to_value), (below, own, own), piece(below, own, False), strict=True
            ):
                whole[:, :, where] += part
        to_sinks = None
        if ctx.needs_input_grad[3]:
            shares = (sinks.to(total.dtype)[None, :, None] - total).exp()
            to_sinks = -(shares * (gradient * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return to_query, to_key, to_value, to_sinks, None, None


def _repeated(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """As many heads as the queries have."""
    times = query.shape[1] // tensor.shape[1]
    # Many times faster than repeat_interleave.
    return tensor if times == 1 else tensor[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
