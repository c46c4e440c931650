"""Layers that carry something from token to token by themselves, on packs: each row is computed for itself there.

State-space models, linear attention and short convolutions know neither masks nor trees: in a pack they carry a row's
state into the next. Their input is therefore laid out as rows, each from its beginning, and their output is laid back
into the pack; all around them (attention, feed-forward layers, output head) stays packed. What rows begin with alike is
computed once per row in these layers and once in the others. Padding stands behind each row, where nothing sees it.

Which modules they are is found by experiment: in a pack, other input for one row changes what they make of the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from finetune_trainer.model.packed_attention import PackingRefusedError, attention_calls, current_pack
from finetune_trainer.model.prefix_tree import Pack

_CHANGE = {torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative change of an output that tells a leak from rounding, by precision; 1e-3 in float32."""

_SIMILAR = 0.75
"""Rows at least so long, in parts of the longest, are computed together."""


@dataclass(frozen=True)
class RowLayer:
    """A module that has to be given rows."""

    module: nn.Module
    token_dims: tuple[tuple[int, ...], ...]
    """Which dimensions of each of its arguments (flattened) are the pack's tokens."""


@dataclass
class _Seen:
    """What a module did in the experiment."""

    leaks: bool = False
    asks: bool = False
    """For attention."""
    token_dims: tuple[tuple[int, ...], ...] = ()


def find_row_layers(decoder: nn.Module, pack: Pack, run: Callable[[], object]) -> list[RowLayer]:
    """The parts of `decoder`'s layers that let rows of `pack` see each other and do not ask for attention.

    Args:
        decoder: has its layers in a list.
        pack: at least two rows; a number of tokens that is no size of the model's.
        run: computes `pack` without gradients.
    """
    seen: dict[nn.Module, _Seen] = {}
    layers = outermost_layers(decoder)
    parts = {layer: list(layer.children()) for layer in layers}
    inner = {part: list(part.children()) for found in parts.values() for part in found}
    probe = _Probe(pack, seen)
    hooks = [
        hook
        for module in {*inner, *(module for found in inner.values() for module in found)}
        for hook in (
            module.register_forward_pre_hook(probe.before),
            module.register_forward_hook(probe.after, with_kwargs=True),
        )
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    chosen: list[nn.Module] = []
    for part, children in inner.items():
        if part in seen and seen[part].leaks:
            below = [child for child in children if child in seen and seen[child].leaks]
            chosen += below if seen[part].asks else [part]
    return [RowLayer(module, seen[module].token_dims) for module in dict.fromkeys(chosen)]


def compute_rows_apart(layers: list[RowLayer]) -> None:
    """From now on these modules get rows where they would get a pack."""
    for layer in layers:
        layer.module.forward = _by_row(layer.module.forward, layer.token_dims)


def usual_layers(layers: list[RowLayer]) -> None:
    """Undo `compute_rows_apart`."""
    for layer in layers:
        vars(layer.module).pop("forward", None)


def outermost_layers(decoder: nn.Module) -> list[nn.Module]:
    """Elements of lists of modules, the outermost only."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                found.append(child)
            else:
                visit(child)

    visit(decoder)
    return found


@dataclass
class _Probe:
    """Hooks that run a module once more, with other input for the first row, while it is being run."""

    pack: Pack
    seen: dict[nn.Module, _Seen]
    _asked: list[int] = field(default_factory=list)
    _busy: bool = False

    def before(self, *_: Any) -> None:
        if not self._busy:
            self._asked.append(attention_calls())

    def after(self, module: nn.Module, args: Any, others: Any, output: Any) -> None:
        if self._busy:
            return
        asks = attention_calls() > self._asked.pop()
        leaves, shape = tree_flatten((args, others))
        states = next((leaf for leaf in leaves if self._is_states(leaf)), None)
        made = _first_tensor(output)
        if states is None or not self._is_states(made):
            return
        first = next(node for node in self.pack.nodes if node.span_end == node.end)
        changed = states.clone()
        changed[:, first.start : first.end] *= -3.0
        changed_args, changed_others = tree_unflatten([changed if leaf is states else leaf for leaf in leaves], shape)
        self._busy = True
        try:
            again = _first_tensor(module.forward(*changed_args, **changed_others))
        finally:
            self._busy = False
        behind = slice(first.end, None)
        change = (again[:, behind] - made[:, behind]).abs().amax() / made[:, behind].abs().amax().clamp(min=1e-12)
        self.seen[module] = _Seen(
            leaks=bool(change > _CHANGE.get(made.dtype, 1e-3)) or (module in self.seen and self.seen[module].leaks),
            asks=asks,
            token_dims=tuple(_token_dims(leaf, self.pack.tokens) for leaf in leaves),
        )

    def _is_states(self, leaf: Any) -> bool:
        return (
            isinstance(leaf, torch.Tensor)
            and leaf.is_floating_point()
            and leaf.ndim == 3
            and leaf.shape[:2] == (1, self.pack.tokens)
        )


def _first_tensor(output: Any) -> Any:
    return next((leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)), None)


def _by_row(original: Callable[..., Any], token_dims: tuple[tuple[int, ...], ...]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(*args: Any, **others: Any) -> Any:
        pack = current_pack()
        if pack is None:
            return original(*args, **others)
        leaves, shape = tree_flatten((args, others))
        if len(leaves) != len(token_dims):
            raise PackingRefusedError("one of its layers is given other arguments than before")
        groups, back = _rows_of(pack)
        made = []
        for places in groups:
            row_args, row_others = tree_unflatten(
                [_rows(leaf, dims, places, pack.tokens) for leaf, dims in zip(leaves, token_dims, strict=True)], shape
            )
            made.append(original(*row_args, **row_others))

        first = torch.cat([_first_tensor(output).flatten(0, 1) for output in made]).index_select(0, back)[None]
        outputs, output_shape = tree_flatten(made[0])
        which = next(number for number, leaf in enumerate(outputs) if isinstance(leaf, torch.Tensor))
        # What else layers return, weights or states, is for caches and those who want to see it.
        rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in outputs]
        return tree_unflatten([*rest[:which], first, *rest[which + 1 :]], output_shape)

    return forward


def _rows(leaf: Any, dims: tuple[int, ...], places: torch.Tensor, tokens: int) -> Any:
    """An argument of a pack -> the same of its rows, which are at `places` int64 [R, L]: dimension 0 is R."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if not dims:
        # Masks may be there for some packs only.
        dims = _token_dims(leaf, tokens)
    if not dims:
        return leaf
    if dims == (1,) and leaf.shape[0] == 1:
        return leaf[0][places]
    if dims == (2, 3) and leaf.shape[0] == 1:
        # [1, C, T, T] -> [R, C, L, L]
        return leaf[0][:, places[:, :, None], places[:, None, :]].movedim(0, 1)
    raise PackingRefusedError("one of its layers takes an argument that cannot be laid out as rows")


def _token_dims(leaf: Any, tokens: int) -> tuple[int, ...]:
    return tuple(dim for dim, size in enumerate(leaf.shape) if size == tokens) if isinstance(leaf, torch.Tensor) else ()


@functools.lru_cache(maxsize=2)
def _rows_of(pack: Pack) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Where the rows of a pack are.

    Returns:
        Groups of rows about as long as each other, int64 [R, L] each: the tokens of a row, behind its end the last once
        more. And int64 [T]: where each of the pack's tokens is among all of these, one group after the other.
    """
    leaves = [node for node in pack.nodes if node.span_end == node.end]
    rows = [
        torch.cat(
            [torch.arange(node.start, node.end) for node in pack.nodes if node.start <= leaf.start < node.span_end]
        )
        for leaf in leaves
    ]
    rows.sort(key=len, reverse=True)
    groups: list[list[torch.Tensor]] = []
    for row in rows:
        if not groups or len(row) < _SIMILAR * len(groups[-1][0]):
            groups.append([])
        groups[-1].append(row)
    back = torch.empty(pack.tokens, dtype=torch.int64)
    device = pack.input_ids.device
    laid, size = [], 0
    for group in groups:
        length = len(group[0])
        places = torch.stack([torch.cat([row, row[-1:].expand(length - len(row))]) for row in group])
        for number, row in enumerate(group):
            back[row] = size + number * length + torch.arange(len(row))
        size += places.numel()
        laid.append(places.to(device))
    return laid, back.to(device)
