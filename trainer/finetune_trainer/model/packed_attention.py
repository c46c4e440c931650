"""Our attention as one of transformers' own kinds, so that every model class that asks its interface gets it.

Outside a pack it is the model's own `sdpa`. Which pack is being computed is held here for the length of a forward and a
backward pass, since activation checkpointing runs layers again in the backward pass, on threads of torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.model.tree_attention import SMALLEST_FLEX_HEAD, dense, flex, in_pieces, tree_mask

NAME = "finetune_packed"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class PackingRefusedError(Exception):
    """The model cannot be run on packs; the text says why and ends no sentence."""


class _Current:
    """What is being computed now."""

    pack: Pack | None = None
    calls: int = 0
    """Attention layers that have asked since the pack began."""


@contextmanager
def attending(pack: Pack | None) -> Iterator[None]:
    """All attention between here and the end is over this pack; None for the model's own."""
    before = _Current.pack, _Current.calls
    _Current.pack, _Current.calls = pack, 0
    try:
        yield
    finally:
        _Current.pack, _Current.calls = before


def attention_calls() -> int:
    """How many attention layers have asked for this pack."""
    return _Current.calls


def use_packed_attention(model: Any) -> None:
    """Make a transformers model use this attention.

    Raises:
        PackingRefusedError: its layers do not take it, or not only.
    """
    config = model.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if others:
        raise PackingRefusedError(f"it has {', '.join(others)} layers")
    if not getattr(model, "_supports_attention_backend", False) or config._attn_implementation not in ("sdpa", NAME):  # noqa: SLF001  it has no public name
        raise PackingRefusedError("its attention cannot be replaced")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *rope.values()] if isinstance(rope, dict) else []
    if any(isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        raise PackingRefusedError("its position embeddings depend on the length of what is computed together")
    model.set_attn_implementation(NAME)


def usual_attention(model: Any) -> None:
    """Undo `use_packed_attention`."""
    model.set_attn_implementation("sdpa")


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Result [1, T, H, D]."""
    pack = _Current.pack
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    _Current.calls += 1
    if dropout or any(others.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        raise PackingRefusedError("its attention has a bias, a cap or a dropout of its own")
    if attention_mask is None and (others.get("sliding_window") or pack.longest) < pack.longest:
        raise PackingRefusedError("its attention slides along what is computed together")
    if attention_mask is not None:
        out = dense(query, key, value, attention_mask, scaling)
    elif query.is_cuda and min(query.shape[-1], value.shape[-1]) >= SMALLEST_FLEX_HEAD:
        out = flex(query, key, value, pack, scaling)
    elif not query.is_cuda and query.shape[-1] == value.shape[-1]:
        out = in_pieces(query, key, value, pack, scaling)
    else:
        out = dense(query, key, value, tree_mask(pack), scaling)
    return out.transpose(1, 2).contiguous(), None


def _mask(local_size: int | None = None, **others: Any) -> torch.Tensor | None:
    """None where the whole path is seen, which the kernels know; else a mask bool [T, T]."""
    pack = _Current.pack
    if pack is None:
        return sdpa_mask(local_size=local_size, **others)
    return None if local_size is None or local_size >= pack.longest else tree_mask(pack, local_size)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
