"""The plan: every row once per epoch, the same on every rank, and the same again after a resume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.outcome import BatchLayout
from finetune_trainer.data.dataset import TokenizedData, prepare
from finetune_trainer.inputs import data_source, load_model_inputs
from finetune_trainer.model.batch import IGNORED, Batch
from finetune_trainer.model.prefix_tree import PrefixedPacks
from finetune_trainer.train.batching import Batching, RankBatches
from finetune_trainer.train.plan import TrainingPlan, default_batch_size, make_plan, save_steps
from tests.trainer.run.tiny_job import TinyJob

PLANS = st.builds(
    TrainingPlan,
    rows=st.integers(1, 60),
    rows_per_step=st.integers(1, 20),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)


@given(PLANS)
def test_every_epoch_has_every_row_once(plan: TrainingPlan) -> None:
    for epoch in range(plan.epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        rows = np.concatenate([plan.rows_of_step(step) for step in steps])
        assert sorted(rows.tolist()) == list(range(plan.rows))


def test_epochs_differ_in_order_and_seeds_do_too() -> None:
    plan = TrainingPlan(rows=50, rows_per_step=50, epochs=2, seed=1)
    other = TrainingPlan(rows=50, rows_per_step=50, epochs=2, seed=2)
    assert plan.rows_of_step(0).tolist() != plan.rows_of_step(1).tolist()
    assert plan.rows_of_step(0).tolist() != other.rows_of_step(0).tolist()


@pytest.mark.parametrize(
    ("num_epochs", "min_update_steps", "epochs"), [(3, 1000, 3), (None, 100, 17), (None, 6, 1), (None, 7, 2)]
)
def test_epochs_follow_from_min_update_steps_only_when_not_given(
    num_epochs: int | None, min_update_steps: int, epochs: int
) -> None:
    plan = make_plan(rows=24, rows_per_step=4, num_epochs=num_epochs, min_update_steps=min_update_steps, seed=0)
    assert plan.epochs == epochs


@pytest.mark.parametrize(
    ("mean", "rows"),
    [(1, 16), (512, 16), (700, 16), (800, 8), (1024, 8), (2048, 4), (4096, 2), (5000, 2), (8192, 1), (131_072, 1)],
)
def test_longer_rows_make_smaller_batches(mean: int, rows: int) -> None:
    assert default_batch_size(1000 * mean, 1000) == rows


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=200))
def test_one_long_row_among_many_short_ones_hardly_counts(tokens: list[int]) -> None:
    alone, among = default_batch_size(sum(tokens), len(tokens)), default_batch_size(sum(tokens) + 20_000, 1000)
    assert 1 <= alone <= 16
    assert among == 16 or sum(tokens) > 500_000


@pytest.mark.parametrize(
    ("total_steps", "every", "at_most", "steps"),
    [
        (10, 4, None, {4, 8, 10}),
        (10, 5, None, {5, 10}),
        (10, 100, None, {10}),
        (10, 1, 2, {5, 10}),
        (10, 1, 3, {4, 8, 10}),
        (10, 6, 5, {6, 10}),
        (1, 1, 1, {1}),
    ],
)
def test_the_model_is_saved_as_often_as_asked_and_at_the_end(
    total_steps: int, every: int, at_most: int | None, steps: set[int]
) -> None:
    assert save_steps(total_steps=total_steps, every=every, at_most=at_most) == steps


@given(st.integers(1, 500), st.integers(1, 100), st.integers(1, 20))
def test_never_more_saves_than_allowed(total_steps: int, every: int, at_most: int) -> None:
    assert len(save_steps(total_steps=total_steps, every=every, at_most=at_most)) <= at_most


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenizedData:
    """24 rows."""
    folder = tmp_path_factory.mktemp("data")
    spec = TinyJob(folder).job().spec
    return prepare(data_source(spec, load_model_inputs(spec), spec.train_path), folder / "cache")


LAYOUTS = [
    Batching(layout, tokens_per_pack=90, rows_per_batch=2, pad_id=0)
    for layout in (BatchLayout.SHARED_PREFIX, BatchLayout.PACKED, BatchLayout.PADDED)
]


@pytest.mark.parametrize("batching", LAYOUTS, ids=lambda batching: batching.layout.value)
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
@pytest.mark.parametrize("in_step", [False, True])
def test_the_batches_of_all_ranks_hold_each_target_of_a_step_once(
    data: TokenizedData, batching: Batching, world_size: int, in_step: bool
) -> None:
    plan = TrainingPlan(rows=len(data), rows_per_step=7, epochs=1, seed=3)
    ranks = [RankBatches(data, rank=rank, world_size=world_size, in_step=in_step) for rank in range(world_size)]
    for step in range(plan.total_steps):
        rows = plan.rows_of_step(step)
        batches = [rank.of(rows, batching) for rank in ranks]
        assert all(batches)
        if in_step:
            # Sharded models hang when one rank runs more batches than another.
            assert len({len(of_rank) for of_rank in batches}) == 1
        found = [batch for of_rank in batches for batch in of_rank if not isinstance(batch, PrefixedPacks)]
        targets = sum(int((batch.targets != IGNORED).sum()) for batch in found)
        assert targets == sum(int(trained.sum()) for row in rows for _, trained in data.sequences(int(row)))
        assert targets == int(data.row_trained_tokens[rows].sum())


def test_padded_batches_have_the_rows_they_are_given(data: TokenizedData) -> None:
    plan = TrainingPlan(rows=len(data), rows_per_step=7, epochs=1, seed=3)
    batches = RankBatches(data, rank=0, world_size=1).of(plan.rows_of_step(0), LAYOUTS[-1])
    assert [len(batch.input_ids) for batch in batches if isinstance(batch, Batch)] == [2, 2, 2, 1]
