"""Rows lie together so that little is computed twice, and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.model import packing
from finetune_trainer.model.batch import IGNORED, TokenPair
from finetune_trainer.model.packing import packs_of, prefixed_packs_of
from finetune_trainer.model.prefix_tree import Pack, PrefixedPacks
from tests.trainer.model.row_trees import behind, trees


@given(rows=trees(), budget=st.integers(1, 200))
def test_every_target_of_every_row_is_there_once(rows: list[TokenPair], budget: int) -> None:
    packs = packs_of(rows, budget=budget, share=True)
    wanted = sorted(int(i) for ids, trained in rows for i in ids[1:][trained[1:]])
    assert sorted(int(i) for pack in packs for i in pack.targets) == wanted


@given(rows=trees(), prefix=st.integers(0, 60), budget=st.integers(20, 300))
def test_packs_behind_a_prefix_hold_every_target_once_within_the_budget_and_compute_less(
    rows: list[TokenPair], prefix: int, budget: int
) -> None:
    rows = behind(prefix, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PACK_COST", 8)
        batches = prefixed_packs_of(rows, budget=budget)
        plain = packs_of(rows, budget=budget, share=True)
    parts = [part for batch in batches for part in (batch.parts if isinstance(batch, PrefixedPacks) else (batch,))]
    wanted = sorted(int(i) for ids, trained in rows for i in ids[1:][trained[1:]])
    assert sorted(int(i) for part in parts for i in part.targets if i != IGNORED) == wanted
    longest = max(part.longest for part in parts)
    assert all(batch.tokens <= max(budget, longest) for batch in batches)
    prefixed = [batch for batch in batches if isinstance(batch, PrefixedPacks)]
    if prefixed:
        assert sum(part.tokens for part in parts) < sum(pack.tokens for pack in plain)
        assert all(len(batch.packs) > 1 for batch in prefixed)


def test_packs_begin_where_rows_share_nothing() -> None:
    prompts = np.arange(3 * 40).reshape(3, 40)
    rows = [(np.concatenate([prompt, [200 + i] * 5]), np.arange(45) >= 42) for prompt in prompts for i in range(4)]
    # Filled up to the bound, the second pack would begin amid the second prompt's rows.
    packs = packs_of(rows, budget=80, share=True)
    assert [pack.tokens for pack in packs] == [40 + 4 * 4] * 3


def test_what_several_packs_begin_with_is_computed_once_and_what_one_begins_with_is_in_it() -> None:
    policy = np.arange(300)
    rows = [(np.concatenate([policy, np.full(60, 400 + i)]), np.arange(360) >= 350) for i in range(9)]
    (alone,) = prefixed_packs_of(rows, budget=1_000)
    assert isinstance(alone, Pack)
    (shared,) = prefixed_packs_of(rows, budget=600)
    assert isinstance(shared, PrefixedPacks)
    assert shared.prefix.tokens == 300
    assert [pack.tokens for pack in shared.packs] == [5 * 59, 4 * 59]
    assert shared.tokens == 300 + 5 * 59


def test_a_shared_prompt_is_stored_once() -> None:
    prompt = np.arange(40)
    rows = [(np.concatenate([prompt, [40 + i] * 5]), np.arange(45) >= 42) for i in range(4)]
    (shared,) = packs_of(rows, budget=1_000, share=True)
    assert shared.input_ids.shape[1] == 40 + 4 * 4  # the last token of a row predicts nothing
    (plain,) = packs_of(rows, budget=1_000, share=False)
    assert plain.input_ids.shape[1] == 4 * 44
