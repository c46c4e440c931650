"""Which rank computes which rows of a step: all are to be done at the same time, for they wait for the slowest.

Longest-first dealing (LPT), then exchanges between the fullest and the emptiest rank. A pure function of lengths that
every rank has, so that all find the same without asking.
"""

from __future__ import annotations

import heapq

import numpy as np

from finetune_trainer.train.plan import Array

ONE_BY_ONE = 16
"""Rows per rank that are dealt one by one. The rest are small parts of a rank's load and are dealt all at once."""
NEAR_ENOUGH = 1.01
"""Most tokens of a rank over the mean of all that no exchange is looked for at; the kernels differ by more."""


def deal(tokens: Array, world_size: int) -> Array:
    """The rank, int64 [n], of each row of a step.

    Ranks get about equally many tokens, as far as rows are whole: one that is longer than the mean of the ranks bounds
    what can be had. No rank gets more than the fullest would by striding. In a pack, rows that begin alike cost less
    than their tokens; which do is known only when the share is laid out, and tokens come near enough.

    Args:
        tokens: whole numbers [n], the length of each row.
        world_size: number of ranks.
    """
    strided = np.arange(len(tokens)) % world_size
    if world_size == 1:
        return strided
    lengths = tokens.astype(np.int64)
    ranks = _longest_first(lengths, world_size)
    load = _load(lengths, ranks, world_size)
    for _ in range(4 * world_size):
        if load.max() <= NEAR_ENOUGH * lengths.sum() / world_size or not _exchange(lengths, ranks, load):
            break
    return ranks if load.max() <= _load(lengths, strided, world_size).max() else strided


def _longest_first(lengths: Array, world_size: int) -> Array:
    """Each row to the rank with fewest tokens so far, then with fewest rows, then the lowest."""
    order = np.argsort(-lengths, kind="stable")
    one_by_one, rest = np.split(order, [ONE_BY_ONE * world_size])
    ranks = np.empty(len(lengths), np.int64)
    heap = [(0, 0, rank) for rank in range(world_size)]
    for row, length in zip(one_by_one.tolist(), lengths[one_by_one].tolist(), strict=True):
        tokens, rows, rank = heap[0]
        ranks[row] = rank
        heapq.heapreplace(heap, (tokens + length, rows + 1, rank))
    emptiest_first = np.array([rank for *_, rank in sorted(heap)])
    # There and back again, so that nobody always has the longer one.
    turns = np.concatenate([emptiest_first, emptiest_first[::-1]])
    ranks[rest] = np.resize(turns, len(rest))
    return ranks


def _exchange(lengths: Array, ranks: Array, load: Array) -> bool:
    """Move the row, or swap the two, that brings the fullest and the emptiest rank nearest; whether there is one.

    `ranks` [n] and `load` [world_size] are changed.
    """
    fullest, emptiest = int(load.argmax()), int(load.argmin())
    gap = load[fullest] - load[emptiest]
    gives, takes = np.flatnonzero(ranks == fullest), np.flatnonzero(ranks == emptiest)
    # The last column is a move: nothing is taken for the row.
    moved = lengths[gives][:, None] - np.append(lengths[takes], 0)
    left = np.abs(gap - 2 * moved)
    give, take = np.unravel_index(left.argmin(), left.shape)
    if left[give, take] >= gap:
        return False
    ranks[gives[give]] = emptiest
    if take < len(takes):
        ranks[takes[take]] = fullest
    load[fullest] -= moved[give, take]
    load[emptiest] += moved[give, take]
    return True


def _load(lengths: Array, ranks: Array, world_size: int) -> Array:
    """Tokens [world_size] of each rank."""
    return np.bincount(ranks, weights=lengths, minlength=world_size).astype(np.int64)
