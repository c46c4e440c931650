"""Places of tokens for models that count them by themselves.

A pack's tokens have places in their rows, which most models take as position ids. Some take none: their embeddings of
positions, or the slopes that ALiBi adds to the scores, are made for places 0 to T-1 of what is computed together. Here
they are made for one row, and each token gets what belongs to its own place. (ALiBi adds to each score something that
depends on the key's place alone; the same added to all scores of a query changes nothing.) Others keep a square that
says which place sees which.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune_trainer.model.decoder import code_of
from finetune_trainer.model.prefix_tree import Pack

CurrentPack = Callable[[], Pack | None]


def takes(decoder: Any, name: str) -> bool:
    """Whether `decoder` has an argument of this name."""
    return name in inspect.signature(decoder.forward).parameters


def first_place(decoder: Any) -> int:
    """What `decoder` takes for the position id of a row's first token: RoBERTa and its kin count from behind the
    padding's.
    """
    counting = (module for module in decoder.modules() if hasattr(module, "create_position_ids_from_input_ids"))
    return max(((getattr(module, "padding_idx", None) or 0) + 1 for module in counting), default=0)


def follow_places(decoder: Any, current: CurrentPack) -> None:
    """Let what `decoder` knows of positions follow the pack that `current` gives, if it does not take position ids."""
    code = code_of(decoder)
    for name, function in list(vars(code).items()):
        if name.startswith("build_") and "alibi" in name and not hasattr(function, "__wrapped__"):
            setattr(code, name, _slopes_by_place(function, current))
    if takes(decoder, "position_ids"):
        return
    for module in decoder.modules():
        if "Positional" in type(module).__name__ and "forward" not in vars(module):
            module.forward = _embeddings_by_place(module, module.forward, current)


def usual_places(decoder: Any) -> None:
    """Undo `follow_places` for this decoder."""
    for module in decoder.modules():
        if getattr(vars(module).get("forward"), "by_place", False):
            del module.forward


def squares_of(decoder: Any) -> list[tuple[nn.Module, torch.Tensor]]:
    """Layers of `decoder` that keep a square [1, 1, n, n] of which place sees which, and it; all call it `bias`."""
    buffers = ((module, dict(module.named_buffers(recurse=False)).get("bias")) for module in decoder.modules())
    return [(module, found) for module, found in buffers if found is not None and found.ndim == 4]


def by_place(squares: list[torch.Tensor], pack: Pack, tree: torch.Tensor) -> list[torch.Tensor]:
    """Squares [1, 1, n, n] of places -> the same [1, 1, T, T] of the pack's tokens, whose tree is bool [T, T]."""
    place = pack.position_ids[0]
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    found = []
    for square in squares:
        equal = next((new for old, new in made if torch.equal(old, square)), None)
        if equal is None:
            equal = square[..., place, :][..., place] * tree.to(square.dtype)
            made.append((square, equal))
        found.append(equal)
    return found


def _slopes_by_place(function: Callable[..., torch.Tensor], current: CurrentPack) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def build(*args: Any, **others: Any) -> torch.Tensor:
        """[..., T], of the places 0 to T-1 if no pack is computed."""
        found, pack = function(*args, **others), current()
        return found if pack is None else found.index_select(-1, pack.position_ids[0])

    return build


def _embeddings_by_place(module: nn.Module, original: Callable[..., Any], current: CurrentPack) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(first: Any, *args: Any, **others: Any) -> Any:
        """Of ids [1, T], or of their shape."""
        pack = current()
        if pack is None:
            return original(first, *args, **others)
        counted = others.get("position_ids")
        if counted is not None:
            return original(first, *args, **{**others, "position_ids": pack.position_ids.view_as(counted)})
        row: Any = torch.Size((1, pack.longest))
        if isinstance(first, torch.Tensor):
            # Some look which ids are padding.
            row = first.new_full(tuple(row), (getattr(module, "padding_idx", None) or 0) + 1)
        return original(row, *args, **others).index_select(-2, pack.position_ids[0])

    forward.by_place = True  # type: ignore[attr-defined]  # for `usual_places`
    return forward
