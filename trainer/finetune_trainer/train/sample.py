"""The few rows that the gate compares layouts on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from finetune_trainer.model.batch import TokenPair
from finetune_trainer.model.packing import MIN_SHARED, common_beginning, lexicographic

SAMPLE_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Most tokens of the rows that are compared, by kind of device: about a second of it, or less than a step."""

_TRAINED_TOKENS = 32
"""At least so many of each row."""


def sample_of(rows: Sequence[list[TokenPair]], tokens: int) -> list[TokenPair]:
    """A few sequences of `rows` that would show a difference: the two with the longest common beginning, the longest
    and the shortest, as far as `tokens` allow.

    Those that are too long are cut, a common beginning at its front, the rest at its end. Where none have a beginning
    in common, one is made that begins as another does. Each trains its last tokens too: of very few the output head's
    gradient is so inexact (in float32 a hundred times more than of many) that nothing could be told from it.
    """
    ordered = sorted((sequence for row in rows for sequence in row), key=lambda sequence: lexicographic(sequence[0]))
    by_length = sorted(ordered, key=lambda sequence: len(sequence[0]))
    shared = [common_beginning(a[0], b[0]) for a, b in itertools.pairwise(ordered)]
    if shared and max(shared) >= MIN_SHARED:
        first = shared.index(max(shared))
        chosen = [_cut(sequence, shared[first], tokens // 4) for sequence in ordered[first : first + 2]]
    else:
        longest, shortest = (_cut(sequence, 0, tokens // 3) for sequence in (by_length[-1], by_length[0]))
        chosen = [longest, _beginning_as(longest, shortest)]
    for sequence in (by_length[-1], by_length[0]):
        if _tokens([*chosen, sequence]) <= tokens and all(sequence[0] is not other[0] for other in chosen):
            chosen.append(sequence)
    if len({len(ids) for ids, _ in chosen}) == 1:
        # Nothing would be padded.
        chosen[-1] = beginning_of(chosen[-1], max(2, len(chosen[-1][0]) * 3 // 4))
    return [(ids, trained | (np.arange(len(ids)) >= len(ids) - _TRAINED_TOKENS)) for ids, trained in chosen]


def _cut(sequence: TokenPair, shared: int, most: int) -> TokenPair:
    """At most `most` of its `shared` first tokens and as many others."""
    ids, trained = (part[max(0, shared - most) : shared + most] for part in sequence)
    return ids, trained


def beginning_of(sequence: TokenPair, tokens: int) -> TokenPair:
    """Its first `tokens` tokens."""
    ids, trained = sequence
    return ids[:tokens], trained[:tokens]


def _beginning_as(first: TokenPair, second: TokenPair) -> TokenPair:
    """A sequence of the first half of `first` and all of `second`."""
    half = max(len(first[0]) // 2, 1)
    return np.concatenate([first[0][:half], second[0]]), np.concatenate([first[1][:half], second[1]])


def _tokens(sequences: Sequence[TokenPair]) -> int:
    return sum(len(ids) for ids, _ in sequences)
