"""How a model's attention is made to follow a pack: through transformers' interfaces for attention and for masks.

Models that ask for attention there get ours (`tree_attention.py`, `flex_tree.py`), and the pack among its arguments.
Others, which compute it themselves, get the tree as the mask that they ask for, so that their biases, caps and windows
stay their own code. What a decoder makes before its layers, masks and places, and layers that get no arguments of ours
find the pack in the context that they run in; activation checkpointing takes the context along (`recomputed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from finetune_trainer.model.decoder import code_of, decoder_of
from finetune_trainer.model.flex_tree import SMALLEST_HEAD, flex
from finetune_trainer.model.places import by_place, first_place, follow_places, squares_of, takes, usual_places
from finetune_trainer.model.prefix_cache import AttendsTwiceError, PrefixCache
from finetune_trainer.model.prefix_tree import Pack
from finetune_trainer.model.tree_attention import Scores, Sight, by_path, in_pieces, masked, tree_mask
from finetune_trainer.model.varlen_rows import side_by_side, takes_side_by_side

NAME = "finetune_packed"

_IMPLEMENTATION = "_attn_implementation_internal"
"""The public name is for whole models: its setter walks over all configurations."""

_ATTENTION = {"full_attention", "attention", "sliding_attention", "chunked_attention"}
"""Of others no mask tells what is seen, or a few rows do not show it: sparse attention begins with long ones."""

_NO_ATTENTION = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding", "mlp", "moe"}
"""Those that carry a state, or attention together with it (see `row_layers.py`), and those of single tokens."""
_SQUARES = 512, 2048
"""Least and most of the bound on a pack's tokens where a model computes attention itself: with scores of all pairs at
once, masked or not."""

_SHORT = 512
"""Tokens up to which a GPU is sooner done with a whole masked square than with starting a kernel that skips parts."""

_HEADS_THAT_TELL_APART = 16
"""Heads of an indexer from which on no two tokens score alike: each head leaves out about half of all tokens."""

_INDEXED = "indexed_attention"
"""Layers that take the best of what their mask lets them see, and make another mask of it."""


class PackingRefusedError(Exception):
    """The model cannot be run on packs; the text says why and ends no sentence."""


@dataclass(eq=False)
class PackRun:
    """One pack on its way through a decoder, forwards and, where layers are computed again, backwards."""

    pack: Pack
    cache: PrefixCache | None = None
    """Takes what is made of the pack, or has what lies before it."""
    asked: int = 0
    """How often the model has asked for attention or for a mask."""
    sights: dict[int, tuple[torch.Tensor, Sight]] = field(default_factory=dict)
    """What masks stand for, by the address of their memory, which they keep."""
    squares: list[tuple[Any, torch.Tensor]] = field(default_factory=list)
    """Layers that keep a square of which place sees which, and what it is for this pack."""


_RUN: ContextVar[PackRun | None] = ContextVar("finetune_pack_run", default=None)


def current_pack() -> Pack | None:
    """What is being computed, or None if it is no pack."""
    run = _RUN.get()
    return None if run is None else run.pack


def attention_calls() -> int:
    """How often the model has asked for attention or for a mask, since the pack began."""
    run = _RUN.get()
    return 0 if run is None else run.asked


def recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For checkpoint's `context_fn`: layers that the backward pass runs again find the pack they were given before,
    on whatever thread that is.
    """
    run = _RUN.get()
    return nullcontext(), nullcontext() if run is None else _computing(run)


@contextmanager
def _computing(run: PackRun) -> Iterator[None]:
    before = [(module, module.bias) for module, _ in run.squares]
    token = _RUN.set(run)
    try:
        for module, square in run.squares:
            module.bias = square
        yield
    finally:
        for module, square in before:
            module.bias = square
        _RUN.reset(token)


class PackedDecoder:
    """The decoder of a causal language model, made ready for packs; for other inputs too its attention is ours until
    `undo`.

    Args:
        model: the causal language model.

    Raises:
        PackingRefusedError: it does not ask for its attention, or what it does cannot be known.
    """

    def __init__(self, model: Any) -> None:
        self._decoder = decoder_of(model)
        _refuse_unknown(self._decoder)
        self._takes_pack = _asks_for_attention(self._decoder)
        self._first_place = first_place(self._decoder) if takes(self._decoder, "position_ids") else None
        # Walks over all modules are made here, not in every pass.
        self._squares = [] if self._takes_pack else squares_of(self._decoder)
        self._implementations: list[tuple[Any, str]] = []
        follow_places(self._decoder, current_pack)
        for module in self._decoder.modules() if self._takes_pack else ():
            config = getattr(module, "config", None)
            found = getattr(config, _IMPLEMENTATION, None)
            if found in ("sdpa", "eager"):
                self._implementations.append((config, found))
                setattr(config, _IMPLEMENTATION, NAME)

    def undo(self) -> None:
        """Leave the model as it was."""
        usual_places(self._decoder)
        for config, found in self._implementations:
            setattr(config, _IMPLEMENTATION, found)

    def __call__(self, pack: Pack, cache: PrefixCache | None = None) -> Any:
        """What the decoder returns for a pack; last_hidden_state [1, T, H].

        Args:
            pack: to be computed.
            cache: for a prefix and the packs behind it.

        Raises:
            PackingRefusedError: the model is not built as this needs it.
        """
        if cache is not None and not self._takes_pack:
            raise PackingRefusedError("it computes its attention itself, to its own tokens only")
        run = PackRun(pack, cache, squares=self._squares_for(pack))
        run.asked = len(run.squares)
        # With a mask of ones transformers does not look for packs of its own in the position ids.
        others: dict[str, Any] = {"attention_mask": torch.ones_like(pack.input_ids)}
        if self._first_place is not None:
            others["position_ids"] = pack.position_ids + self._first_place
        if self._takes_pack:
            others["pack_run"] = run
        with _computing(run):
            found = self._decoder(input_ids=pack.input_ids, use_cache=False, **others)
        if not run.asked:
            raise PackingRefusedError("it asks transformers for neither attention nor masks")
        return found

    def _squares_for(self, pack: Pack) -> list[tuple[Any, torch.Tensor]]:
        if not self._squares:
            return []
        changed = by_place([square for _, square in self._squares], pack, tree_mask(pack))
        return [(module, new) for (module, _), new in zip(self._squares, changed, strict=True)]


def _refuse_unknown(decoder: Any) -> None:
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - _ATTENTION - _NO_ATTENTION - {_INDEXED})
    if others:
        raise PackingRefusedError(f"it has {', '.join(others)} layers")
    if kinds and kinds <= {"linear_attention", "mamba", "conv"}:
        raise PackingRefusedError("all its layers carry a state from token to token, so rows have little to share")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [rope, *rope.values()] if isinstance(rope, dict) else []
    if any(isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope") for kind in ropes):
        raise PackingRefusedError("its position embeddings depend on the length of what is computed together")
    if not (_asks_for_attention(decoder) or _follows_masks(decoder)):
        raise PackingRefusedError("its attention cannot be replaced")


def _asks_for_attention(decoder: Any) -> bool:
    indexed = _INDEXED in (getattr(decoder.config, "layer_types", None) or ())
    return hasattr(code_of(decoder), "ALL_ATTENTION_FUNCTIONS") and not indexed


def _follows_masks(decoder: Any) -> bool:
    """Whether it is one of transformers' own models, none of which does more than its masks say, and asks for them."""
    code = code_of(decoder)
    # BigBird's attention has blocks until few tokens make it whole for good.
    whole = getattr(decoder, "attention_type", None) != "block_sparse"
    asks = hasattr(code, "create_causal_mask") or bool(squares_of(decoder))
    return whole and asks and code.__name__.startswith("transformers.")


def most_tokens(model: Any) -> int | None:
    """Tokens of a pack up to which the model's own code is right about several rows and does not cost more than they
    would alone; None for any number.
    """
    decoder = decoder_of(model)
    config = decoder.config
    bounds = []
    if not _asks_for_attention(decoder):
        # Beyond about as many as a hidden state has numbers, the scores of all pairs cost more than the rest.
        bounds.append(min(max(getattr(config, "hidden_size", 0), _SQUARES[0]), _SQUARES[1]))
    if getattr(config, "attn_temperature_tuning", False):
        # Llama 4 scales queries by their place among all that is computed, beginning with this one.
        bounds.append(config.floor_scale - 1)
    if (chosen := _chosen_tokens(config)) is not None:
        # Up to here all is taken that is seen; beyond, equals are told apart by their place among all.
        bounds.append(chosen)
    return min(bounds, default=None)


def chooses_among_equals(model: Any, longest: int) -> str | None:
    """Why rows of up to `longest` tokens have to be computed one by one, as an end of a sentence: an indexer of few
    heads scores many tokens exactly 0, and which of them it takes hangs on the width of what is computed. None where
    there is no such danger.
    """
    config = decoder_of(model).config
    chosen = _chosen_tokens(config)
    heads = getattr(config, "index_n_heads", None) or getattr(config, "indexer_n_heads", None) or 0
    if chosen is None or longest <= chosen or heads >= _HEADS_THAT_TELL_APART:
        return None
    return f"its indexer takes {chosen} tokens of longer rows and tells equals apart by the width of what is computed"


def _chosen_tokens(config: Any) -> int | None:
    """Tokens that an indexer takes for each; None where there is none."""
    if _INDEXED not in (getattr(config, "layer_types", None) or ()):
        return None
    return getattr(config, "index_topk", None) or getattr(config, "indexer_budget", None)


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
    # Some layers hand on no arguments to their attention.
    run = others.get("pack_run") or _RUN.get()
    if run is None:
        raise PackingRefusedError("its attention is not told what is computed")
    pack = run.pack
    if key.shape[2] != pack.tokens:
        raise PackingRefusedError("it attends to more than its own tokens")
    if run.cache is not None:
        key, value = _with_prefix(run.cache, module, pack, key, value, others.get("position_bias"))
    run.asked += 1
    sight = None
    if attention_mask is not None:
        _, sight = run.sights.get(attention_mask.untyped_storage().data_ptr(), (None, None))
        if sight is None or attention_mask.shape[-2:] != (pack.tokens, pack.tokens):
            raise PackingRefusedError("it changes its masks")
    if sight is not None and sight.reach is not None and sight.reach >= pack.longest:
        sight = None
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        cap=others.get("softcap"),
        bias=others.get("position_bias"),
        sinks=others.get("s_aux"),
        dropout=dropout if module.training else 0.0,
    )
    out = _kernel(query, value, pack, sight, scores)(query, key, value, pack, sight, scores)
    return out.transpose(1, 2).contiguous(), None


def _kernel(
    query: torch.Tensor, value: torch.Tensor, pack: Pack, sight: Sight | None, scores: Scores
) -> Callable[..., torch.Tensor]:
    """The fastest way that does what is asked for."""
    weighed = scores.bias is not None or bool(scores.dropout)
    if not query.is_cuda:
        return by_path if weighed or sight is not None or scores.cap is not None else in_pieces
    if pack.before + pack.tokens <= _SHORT:
        return by_path if weighed else masked
    if takes_side_by_side(query, value, pack, sight, scores):
        return side_by_side
    return by_path if weighed or min(query.shape[-1], value.shape[-1]) < SMALLEST_HEAD else flex


def _with_prefix(
    cache: PrefixCache, layer: Any, pack: Pack, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if bias is not None:
        raise PackingRefusedError("its scores have a bias that is known between its own tokens only")
    try:
        return cache.with_prefix(layer, pack, key, value)
    except (AttendsTwiceError, KeyError):
        raise PackingRefusedError("its layers ask for attention more than once") from None


def _sight(pack: Pack, arguments: dict[str, Any]) -> Sight | None:
    """What a layer sees of its path, from what transformers says of the mask that it wants; None for all of it."""
    if not arguments["q_length"] == arguments["kv_length"] == pack.tokens:
        raise PackingRefusedError("it attends to more than its own tokens")
    reach, custom = arguments.get("local_size"), arguments.get("use_vmap", False)
    if reach is None and not custom:
        return None
    if arguments.get("attention_mask") is None:
        # Then it may have been changed to something about the order of position ids.
        raise PackingRefusedError("its masks cannot be told")
    return Sight(arguments["mask_function"], None if custom else reach)


def _mask(**arguments: Any) -> torch.Tensor | None:
    """For `_attention`: None where the whole path is seen, else bool [1, 1, T, T] that stands for a sight."""
    run = _RUN.get()
    if run is None:
        return sdpa_mask(**arguments)
    pack = run.pack
    sight = _sight(pack, arguments)
    if sight is None:
        return None
    # Known by its memory: who makes another mask of it is found out, who only takes all of it is not.
    mask = torch.zeros((), dtype=torch.bool, device=pack.span_end.device).expand(1, 1, pack.tokens, pack.tokens)
    run.sights[mask.untyped_storage().data_ptr()] = (mask, sight)
    return mask


def _tree_instead(own: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """transformers' own kind of mask, but of the pack that is being computed."""

    def mask(*args: Any, **arguments: Any) -> torch.Tensor | None:
        run = _RUN.get()
        if run is None:
            return own(*args, **arguments)
        run.asked += 1
        found = tree_mask(run.pack, _sight(run.pack, arguments))[None, None]
        if own is sdpa_mask:
            return found
        dtype = arguments.get("dtype", torch.float32)
        return torch.zeros(found.shape, dtype=dtype, device=found.device).masked_fill_(~found, torch.finfo(dtype).min)

    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
AttentionMaskInterface.register("sdpa", _tree_instead(sdpa_mask))
AttentionMaskInterface.register("eager", _tree_instead(eager_mask))
