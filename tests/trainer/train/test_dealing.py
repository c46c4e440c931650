"""The dealing of a step's rows: each to one rank, the same on all, and no rank much longer at it than the others."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.train.dealing import deal
from finetune_trainer.train.plan import Array

TOKENS = st.lists(st.integers(1, 5000), min_size=1, max_size=200).map(np.array)
WORLD = st.integers(1, 9)


def fullest(tokens: Array, ranks: Array) -> int:
    return int(np.bincount(ranks, weights=tokens).max())


@given(TOKENS, WORLD)
def test_the_shares_of_all_ranks_are_the_rows_of_the_step(tokens: Array, world_size: int) -> None:
    rows = np.random.default_rng(0).permutation(1000)[: len(tokens)]
    shares = [rows[deal(tokens, world_size) == rank].tolist() for rank in range(world_size)]
    assert sorted(itertools.chain(*shares)) == sorted(rows.tolist())


@given(TOKENS)
def test_one_rank_has_all_rows_in_order(tokens: Array) -> None:
    rows = np.arange(len(tokens))[::-1]
    assert rows[deal(tokens, 1) == 0].tolist() == rows.tolist()


@given(TOKENS, WORLD)
def test_the_type_of_the_lengths_changes_nothing(tokens: Array, world_size: int) -> None:
    before = tokens.copy()
    dealt = [deal(tokens.astype(kind), world_size).tolist() for kind in (np.uint16, np.uint32, np.int64)]
    assert dealt[0] == dealt[1] == dealt[2]
    assert (tokens == before).all()


@given(TOKENS, WORLD)
def test_the_fullest_rank_is_never_fuller_than_by_striding(tokens: Array, world_size: int) -> None:
    assert fullest(tokens, deal(tokens, world_size)) <= fullest(tokens, np.arange(len(tokens)) % world_size)


@given(TOKENS, WORLD)
def test_no_rank_idles_while_there_are_rows_for_all(tokens: Array, world_size: int) -> None:
    assert len(set(deal(tokens, world_size).tolist())) == min(len(tokens), world_size)


@pytest.mark.parametrize(
    ("tokens", "world_size", "ranks"),
    [
        ([5, 5, 5, 5], 4, [0, 1, 2, 3]),
        ([1, 2, 3], 5, [2, 1, 0]),
        ([9, 1, 1, 1], 2, [0, 1, 1, 1]),
        ([4, 3, 3, 2], 2, [0, 1, 1, 0]),
        # Longest first alone would make 7 and 5 of them.
        ([3, 3, 2, 2, 2], 2, [1, 1, 0, 0, 0]),
        # Striding happens to be the better of the two.
        ([9, 11, 4, 11, 9, 3, 3], 2, [0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_longest_first_and_then_exchanged(tokens: list[int], world_size: int, ranks: list[int]) -> None:
    assert deal(np.array(tokens), world_size).tolist() == ranks


@pytest.mark.parametrize(("world_size", "rows"), [(2, 4), (8, 4), (8, 16), (16, 64)])
def test_ranks_have_equally_many_tokens_as_far_as_the_longest_row_allows(world_size: int, rows: int) -> None:
    random = np.random.default_rng(0)
    # Log-normal with a standard deviation of 0.8 means, as lengths of chat data are.
    lengths = [random.lognormal(6, 0.703, world_size * rows).astype(np.int64) + 1 for _ in range(100)]
    reachable = [max(tokens.sum() / world_size, tokens.max()) for tokens in lengths]
    ratio = [fullest(tokens, deal(tokens, world_size)) / best for tokens, best in zip(lengths, reachable, strict=True)]
    assert np.mean(ratio) <= 1.02
    assert np.percentile(ratio, 95) <= 1.05
