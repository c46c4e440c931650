"""Rows as a prefix tree: what several of them begin with is stored, and later computed, once.

A pack is the tree written down depth first. A token may attend to the tokens before it whose node lies on its own path,
and those are exactly the ones whose subtree has not ended yet: kv <= q < span_end[kv]. Rows without a common beginning
are roots side by side, which is plain block-diagonal packing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune_trainer.model.batch import IGNORED, TokenPair

MIN_SHARED = 4
"""Tokens. A shorter common beginning costs more in pieces of attention than computing it twice."""

Array = np.ndarray[Any, np.dtype[Any]]


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

    @property
    def tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> Pack:
        """The same on `device`."""
        if device == self.input_ids.device:
            return self
        names = ("input_ids", "position_ids", "span_end", "sources", "targets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class _Sequence:
    """A row without what lies behind its last prediction, which no prediction can see."""

    ids: Array
    """int64 [L]: the tokens that are computed."""
    sources: Array
    """int64 [n]: places that predict."""
    targets: Array
    """int64 [n]."""


def packs_of(sequences: Sequence[TokenPair], *, budget: int, share: bool, whole: bool = False) -> list[Pack]:
    """The sequences in as few packs as the budget allows, about equally full, the fullest first.

    Args:
        sequences: (ids int64 [L], trained bool [L]) each, at least one.
        budget: most tokens of a pack; a longer sequence gets a pack of its own.
        share: whether common beginnings are stored once; without it every sequence is a root.
        whole: whether the budget counts a common beginning once for every sequence that has it.
    """
    cut, shared = _in_order(sequences, share)
    lengths = [len(sequence.ids) for sequence in cut]
    counted = [0] * len(cut) if whole else shared
    groups = _fill(lengths, counted, _even_budget(lengths, counted, budget))
    packs = [_pack(cut[first:last], [0, *shared[first + 1 : last]]) for first, last in groups]
    return sorted(packs, key=lambda pack: -pack.tokens)


def pack_count(sequences: Sequence[TokenPair], *, budget: int, share: bool, whole: bool = False) -> int:
    """How many packs `packs_of` makes of the same arguments."""
    cut, shared = _in_order(sequences, share)
    return len(_fill([len(sequence.ids) for sequence in cut], [0] * len(cut) if whole else shared, budget))


def without_predictions(sequence: TokenPair) -> Pack:
    """A pack of a sequence's first token that predicts nothing: its loss is 0, and so is its gradient."""
    (pack,) = packs_of([(sequence[0][:1], sequence[1][:1])], budget=1, share=False)
    return replace(pack, sources=torch.zeros(1, dtype=torch.int64), targets=torch.full((1,), IGNORED))


def _in_order(sequences: Sequence[TokenPair], share: bool) -> tuple[list[_Sequence], list[int]]:
    """The sequences in lexicographic order, and how many first tokens each has in common with the one before."""
    cut = [_cut(ids, trained) for ids, trained in sequences]
    # In this order a sequence shares with no earlier one more than with the one just before it.
    cut.sort(key=lambda sequence: lexicographic(sequence.ids))
    return cut, [0] + [_shared(a.ids, b.ids) if share else 0 for a, b in itertools.pairwise(cut)]


def _cut(ids: Array, trained: Array) -> _Sequence:
    sources = np.flatnonzero(trained[1:])
    # Where nothing is predicted a token is left, so that the model has something to run on.
    length = int(sources[-1]) + 1 if len(sources) else 1
    return _Sequence(ids[:length], sources, ids[sources + 1])


def lexicographic(ids: Array) -> bytes:
    """Sort key: sequences that begin alike lie side by side."""
    return ids.astype(">u4").tobytes()


def common_beginning(a: Array, b: Array) -> int:
    """Tokens that two sequences begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _shared(a: Array, b: Array) -> int:
    """Length of the common beginning, or 0 when it is too short to be worth it."""
    common = common_beginning(a, b)
    return common if common >= MIN_SHARED else 0


def _fill(lengths: list[int], shared: list[int], budget: int) -> list[tuple[int, int]]:
    """Runs (first, last) of sequences, each within the budget."""
    groups, first, used = [], 0, 0
    for number, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        if number > first and used + length - common > budget:
            groups.append((first, number))
            first, used, common = number, 0, 0
        used += length - (common if number > first else 0)
    return [*groups, (first, len(lengths))]


def _even_budget(lengths: list[int], shared: list[int], budget: int) -> int:
    """The smallest budget that needs no more packs."""
    fewest = len(_fill(lengths, shared, budget))
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_fill(lengths, shared, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(eq=False)
class _Open:
    """A node while its pack is written."""

    start: int
    end: int
    depth: int
    """Tokens on the path before it."""
    span_end: int = 0

    @property
    def bottom(self) -> int:
        """Tokens on the path up to its end."""
        return self.depth + self.end - self.start

    def split(self, depth: int, span_end: int) -> _Open:
        """End at `depth`; the node that takes the rest, with all descendants so far, which end at `span_end`."""
        middle = self.start + depth - self.depth
        lower = _Open(middle, self.end, depth, span_end)
        self.end = middle
        return lower


def _pack(sequences: Sequence[_Sequence], shared: Sequence[int]) -> Pack:
    """One pack of sequences in lexicographic order; sequence i has its first shared[i] tokens in common with i-1."""
    nodes: list[_Open] = []
    path: list[_Open] = []  # to the end of the latest sequence
    ids: list[Array] = []
    places: list[Array] = []
    where = np.zeros(0, dtype=np.int64)  # of each token of the latest sequence in the pack
    sources, targets = [], []
    size = 0
    for sequence, common in zip(sequences, shared, strict=True):
        while path and path[-1].depth >= common:
            path.pop().span_end = size
        if path and common - path[-1].depth < MIN_SHARED:
            # So little of the last node is shared that it is computed again.
            common = path[-1].depth
            path.pop().span_end = size
        if path and path[-1].bottom > common:
            nodes.insert(nodes.index(path[-1]) + 1, path[-1].split(common, size))
        own = sequence.ids[common:]
        if len(own):
            node = _Open(size, size + len(own), common)
            nodes.append(node)
            path.append(node)
        where = np.concatenate([where[:common], np.arange(size, size + len(own))])
        ids.append(own)
        places.append(np.arange(common, len(sequence.ids)))
        size += len(own)
        sources.append(where[sequence.sources])
        targets.append(sequence.targets)
    for node in path:
        node.span_end = size
    return Pack(
        torch.from_numpy(np.concatenate(ids))[None],
        torch.from_numpy(np.concatenate(places))[None],
        torch.from_numpy(np.concatenate([np.full(node.end - node.start, node.span_end) for node in nodes])),
        torch.from_numpy(np.concatenate(sources)),
        torch.from_numpy(np.concatenate(targets)),
        tuple(Node(node.start, node.end, node.span_end) for node in nodes),
        max(len(sequence.ids) for sequence in sequences),
    )
