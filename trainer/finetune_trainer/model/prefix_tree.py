"""Rows as a prefix tree: what several of them begin with is stored, and later computed, once.

A pack is the tree written down depth first. A token may attend to the tokens before it whose node lies on its own path,
and those are exactly the ones whose subtree has not ended yet: kv <= q < span_end[kv]. Rows without a common beginning
are roots side by side, which is plain block-diagonal packing. Where rows with a long common beginning do not fit into
one pack, it is a pack of its own, and the others lie behind it (`prefix_cache.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune_trainer.model.batch import Batch, moved


@dataclass(frozen=True)
class Node:
    """A run of tokens that the same rows have in common."""

    start: int
    """First token in the pack."""
    end: int
    """Behind its last token; its descendants follow."""
    span_end: int
    """Behind the last token of its last descendant; `end` for a leaf."""


@dataclass(frozen=True, eq=False)
class Pack:
    """T tokens of a prefix tree, depth first, and N predictions. Equal to itself alone, so that what is made of it can
    be kept by it.
    """

    input_ids: torch.Tensor
    """int64 [1, T]."""
    position_ids: torch.Tensor
    """int64 [1, T]: each token's place in the rows it belongs to."""
    span_end: torch.Tensor
    """int64 [T]: behind the last token that may attend to this one."""
    sources: torch.Tensor
    """int64 [N]: the token whose hidden state predicts. A shared one may appear once per row."""
    targets: torch.Tensor
    """int64 [N]: the token to predict, or IGNORED."""
    nodes: tuple[Node, ...]
    """Depth first; together they cover all tokens."""
    longest: int
    """Tokens of the longest row."""
    before: int = 0
    """Tokens that all rows begin with and that are no part of the pack: what attends to it is given their keys and
    values, before its own."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def key_places(self) -> torch.Tensor:
        """int64 [before + T]: places of all that may be attended to."""
        place = self.position_ids[0]
        return torch.cat([torch.arange(self.before, device=place.device), place]) if self.before else place

    @property
    def key_nodes(self) -> tuple[Node, ...]:
        """The tree of these: where something lies before the pack, it is the root of all."""
        if not self.before:
            return self.nodes
        root = Node(0, self.before, self.before + self.tokens)
        return (root, *(Node(*(self.before + end for end in (n.start, n.end, n.span_end))) for n in self.nodes))

    def to(self, device: torch.device) -> Pack:
        """The same on `device`."""
        if device == self.input_ids.device:
            return self
        names = ("input_ids", "position_ids", "span_end", "sources", "targets")
        tensors: dict[str, Any] = {name: moved(getattr(self, name), device) for name in names}
        return replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class PrefixedPacks:
    """Packs whose rows all begin alike, and what they begin with: it is computed once for all of them."""

    prefix: Pack
    """One node, with all predictions that are made from it."""
    packs: tuple[Pack, ...]
    """The fullest first; each has `before` set."""

    @property
    def tokens(self) -> int:
        """What is in memory at a time."""
        return self.prefix.tokens + self.packs[0].tokens

    @property
    def computed(self) -> int:
        """Tokens of all."""
        return sum(pack.tokens for pack in self.parts)

    @property
    def parts(self) -> tuple[Pack, ...]:
        """The prefix and the packs."""
        return (self.prefix, *self.packs)

    def to(self, device: torch.device) -> PrefixedPacks:
        """The same on `device`."""
        return PrefixedPacks(self.prefix.to(device), tuple(pack.to(device) for pack in self.packs))


AnyBatch = Batch | Pack | PrefixedPacks
