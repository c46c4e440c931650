"""Which rows lie together in a pack: so that as few tokens are computed as the memory for one allows.

In lexicographic order a row shares with no earlier one more than with the one just before it, so packs are runs of
rows in that order, and a run costs what its rows add to each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from finetune_trainer.model.batch import IGNORED, Array, TokenPair
from finetune_trainer.model.prefix_tree import Node, Pack, PrefixedPacks

MIN_SHARED = 4
"""Tokens. A shorter common beginning costs more in pieces of attention than computing it twice."""

_PACK_COST = 128
"""What one pack more costs, in tokens: packs of 1,024 tokens are as fast as larger ones, of 512 a fifth slower."""

_UNEVEN = 1 / 16
"""Of a full pack its size counts so much more: packs that are about equally full take the least memory."""


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
    """The sequences in packs within the budget, so that as few tokens are computed as possible; the fullest first.

    Args:
        sequences: (ids int64 [L], trained bool [L]) each, at least one.
        budget: most tokens of a pack; a longer sequence gets a pack of its own.
        share: whether common beginnings are stored once; without it every sequence is a root.
        whole: whether the budget counts a common beginning once for every sequence that has it.
    """
    cut, shared = _in_order(sequences, share)
    return _packs(cut, shared, _groups(_lengths(cut), _counted(shared, whole), budget)[0])


def prefixed_packs_of(sequences: Sequence[TokenPair], *, budget: int, cost: float = 1.0) -> list[Pack | PrefixedPacks]:
    """As `packs_of`, which shares; but what rows of several packs begin with is computed once where that is less work.

    Args:
        sequences: as in `packs_of`.
        budget: most tokens of a prefix with one of its packs.
        cost: of how many tokens of a pack a token of a prefix takes the memory.
    """
    cut, shared = _in_order(sequences, share=True)
    found: list[Pack | PrefixedPacks] = []
    rest: list[_Sequence] = []
    for first, last in _families(shared):
        family = cut[first:last]
        prefixed = _prefixed(family, [0, *shared[first + 1 : last]], budget, cost)
        if prefixed is None:
            rest += family
        else:
            found.append(prefixed)
    if rest:
        shared = _all_shared(rest)
        found += _packs(rest, shared, _groups(_lengths(rest), shared, budget)[0])
    return sorted(found, key=lambda batch: -batch.tokens)


def behind_one_prefix(sequences: Sequence[TokenPair]) -> PrefixedPacks | None:
    """Each sequence in a pack of its own behind what all begin with; None where that is nothing."""
    cut, shared = _in_order(sequences, share=True)
    prefix = _prefix_of(cut, shared)
    return _behind(cut, shared, prefix, [(n, n + 1) for n in range(len(cut))]) if prefix else None


def pack_count(sequences: Sequence[TokenPair], *, budget: int, share: bool, whole: bool = False) -> int:
    """How many packs `packs_of` makes of the same arguments."""
    cut, shared = _in_order(sequences, share)
    return len(_groups(_lengths(cut), _counted(shared, whole), budget)[0])


def without_predictions(sequence: TokenPair) -> Pack:
    """A pack of a sequence's first token that predicts nothing: its loss is 0, and so is its gradient."""
    (pack,) = packs_of([(sequence[0][:1], sequence[1][:1])], budget=1, share=False)
    return replace(pack, sources=torch.zeros(1, dtype=torch.int64), targets=torch.full((1,), IGNORED))


def _in_order(sequences: Sequence[TokenPair], share: bool) -> tuple[list[_Sequence], list[int]]:
    """The sequences in lexicographic order, and how many first tokens each has in common with the one before."""
    cut = [_cut(ids, trained) for ids, trained in sequences]
    # In this order a sequence shares with no earlier one more than with the one just before it.
    cut.sort(key=lambda sequence: lexicographic(sequence.ids))
    return cut, _all_shared(cut) if share else [0] * len(cut)


def _all_shared(ordered: Sequence[_Sequence]) -> list[int]:
    return [0] + [_shared(a.ids, b.ids) for a, b in itertools.pairwise(ordered)]


def _lengths(cut: Sequence[_Sequence]) -> list[int]:
    return [len(sequence.ids) for sequence in cut]


def _counted(shared: list[int], whole: bool) -> list[int]:
    """What a budget does not count once more."""
    return [0] * len(shared) if whole else shared


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


def _groups(lengths: Sequence[int], shared: Sequence[int], budget: int) -> tuple[list[tuple[int, int]], float]:
    """Runs (first, last) of sequences, each within the budget, at the least cost; and that cost, in tokens.

    A run computes all of its first sequence, so runs begin where little is shared with the sequence before.
    """
    total = len(lengths)
    size = np.asarray(lengths)
    # Tokens of a run: those of its first sequence, and what the others do not share with the one before.
    new = np.concatenate([[0], np.cumsum(size - np.asarray(shared))])
    costs = np.zeros(total + 1)
    begins = np.zeros(total + 1, dtype=np.int64)
    lowest = 0
    for last in range(1, total + 1):
        while lowest < last - 1 and size[lowest] + new[last] - new[lowest + 1] > budget:
            lowest += 1
        tokens = size[lowest:last] + new[last] - new[lowest + 1 : last + 1]
        found = costs[lowest:last] + _PACK_COST + tokens * (1 + _UNEVEN * tokens / budget)
        best = int(found.argmin())
        costs[last], begins[last] = found[best], lowest + best
    groups, last = [], total
    while last:
        groups.append((int(begins[last]), last))
        last = int(begins[last])
    return groups[::-1], float(costs[-1])


def _packs(
    cut: Sequence[_Sequence], shared: Sequence[int], groups: Sequence[tuple[int, int]], before: int = 0
) -> list[Pack]:
    packs = [_pack(cut[first:last], [0, *shared[first + 1 : last]], before) for first, last in groups]
    return sorted(packs, key=lambda pack: -pack.tokens)


def _families(shared: Sequence[int]) -> list[tuple[int, int]]:
    """Runs (first, last) of sequences that share enough with the one before to be worth a pack."""
    starts = [number for number, common in enumerate(shared) if common < _PACK_COST]
    return list(itertools.pairwise([*starts, len(shared)]))


def _prefix_of(family: Sequence[_Sequence], shared: Sequence[int]) -> int:
    """Tokens that all begin with, and that leave each a token of its own."""
    return min(min(shared[1:], default=0), *(length - 1 for length in _lengths(family)))


def _prefixed(family: Sequence[_Sequence], shared: Sequence[int], budget: int, cost: float) -> PrefixedPacks | None:
    """Sequences that begin alike, if they fill several packs and a prefix of their own is less work."""
    lengths = _lengths(family)
    prefix = _prefix_of(family, shared)
    room = budget - math.ceil(prefix * cost)
    if sum(lengths) - sum(shared) <= budget or room <= 0:
        return None
    _, work = _groups(lengths, shared, budget)
    groups, others = _groups([length - prefix for length in lengths], _behind_shared(shared, prefix), room)
    return _behind(family, shared, prefix, groups) if _PACK_COST + prefix + others < work else None


def _behind_shared(shared: Sequence[int], prefix: int) -> list[int]:
    return [max(0, common - prefix) for common in shared]


def _behind(
    family: Sequence[_Sequence], shared: Sequence[int], prefix: int, groups: Sequence[tuple[int, int]]
) -> PrefixedPacks:
    """Packs of what follows the first `prefix` tokens, which all have in common."""
    own, sources, targets = [], [], []
    for sequence in family:
        inside = sequence.sources < prefix
        sources.append(sequence.sources[inside])
        targets.append(sequence.targets[inside])
        own.append(_Sequence(sequence.ids[prefix:], sequence.sources[~inside] - prefix, sequence.targets[~inside]))
    if not any(len(each) for each in sources):
        # A prefix too goes through the head.
        sources, targets = [np.zeros(1, dtype=np.int64)], [np.full(1, IGNORED)]
    shared_part = _Sequence(family[0].ids[:prefix], np.concatenate(sources), np.concatenate(targets))
    packs = _packs(own, _behind_shared(shared, prefix), groups, prefix)
    return PrefixedPacks(_pack([shared_part], [0]), tuple(packs))


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


def _pack(sequences: Sequence[_Sequence], shared: Sequence[int], before: int = 0) -> Pack:
    """One pack of sequences in lexicographic order; sequence i has its first shared[i] tokens in common with i-1, and
    all have `before` others before them.
    """
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
        torch.from_numpy(np.concatenate(places) + before)[None],
        torch.from_numpy(np.concatenate([np.full(node.end - node.start, node.span_end) for node in nodes])),
        torch.from_numpy(np.concatenate(sources)),
        torch.from_numpy(np.concatenate(targets)),
        tuple(Node(node.start, node.end, node.span_end) for node in nodes),
        before + max(len(sequence.ids) for sequence in sequences),
        before,
    )
