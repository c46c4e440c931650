"""How many tokens a pack may have, and whether activations are checkpointed, follow from what fits."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.outcome import BatchLayout
from finetune_trainer.model.batch import pad
from finetune_trainer.train import choice as choices
from finetune_trainer.train import memory
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import Choice, Chooser
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.gate import without_dropout
from tests.trainer.train.test_gate import INDEXED, LATENT, passes_of, rows, tiny

CPU = torch.device("cpu")
BATCHING = Batching(BatchLayout.SHARED_PREFIX, tokens_per_pack=0, rows_per_batch=2, pad_id=0)


def test_what_is_kept_grows_with_tokens_and_counts_no_weights() -> None:
    model = tiny("Llama", dropout=0.0)
    found = []
    for length in (64, 128):
        counter = memory.KeptBytes(model)
        with without_dropout(model), counter.counting():
            passes_of(model)(model, [pad(rows(length, shared=0)[0], 0)])
        found.append(counter.total)
    # Per token and layer between 10 and 60 values of the hidden size (32).
    assert 4 * 32 * 4 * 10 < found[1] / 128 < 4 * 32 * 4 * 60
    assert found[1] == pytest.approx(2 * found[0], rel=0.15)


@pytest.mark.parametrize(
    ("free", "processes", "reserved", "tokens"),
    [(1_000_000, 1, 0, 600), (1_000_000, 2, 0, 300), (1_000_000, 1, 500_000, 300), (1_000, 1, 5_000, 0)],
)
def test_a_share_of_what_is_free_is_used(
    monkeypatch: pytest.MonkeyPatch, free: int, processes: int, reserved: int, tokens: int
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=free))
    monkeypatch.setattr(memory, "_cgroup_free", list)
    assert memory.tokens_that_fit(1000.0, device=CPU, processes=processes, reserved=reserved) == tokens


def test_the_limit_of_the_control_group_counts(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod\n")
    group = tmp_path / "cgroup/pod"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("700\n")
    (group / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    (group / "memory.max").write_text("1000\n")
    assert memory._cgroup_free(tmp_path / "proc", tmp_path / "cgroup") == [400]
    (group / "memory.max").write_text("max\n")
    assert memory._cgroup_free(tmp_path / "proc", tmp_path / "cgroup") == []


def choose(model: Any, *, fit: int, asked: bool | None, earlier: dict[str, Any] | None = None) -> Choice:
    """The choice on a device where `fit` tokens fit without checkpointing, and eight times as many with it."""
    chooser = Chooser(model, model, passes_of(model), Ranks(), checkpointing=asked)
    full = chooser._kept_bytes_per_token(rows(60)[0][0], BATCHING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            choices,
            "tokens_that_fit",
            lambda bytes_per_token, **_: fit if bytes_per_token > 0.9 * full else 8 * fit,
        )
        return chooser.choose(rows(31, 45, 60), BATCHING, longest=2500, earlier=earlier)


@pytest.mark.parametrize(
    ("fit", "asked", "checkpointing", "tokens"),
    [
        (100_000, None, False, 4096),
        (2_600, None, False, 2_560),
        # The longest row would not fit.
        (2_300, None, True, 4096),
        (400, None, True, 3_072),
        (400, False, False, 256),
    ],
)
def test_activations_are_checkpointed_only_where_they_would_not_fit(
    fit: int, asked: bool | None, checkpointing: bool, tokens: int
) -> None:
    model = tiny("Llama", dropout=0.0)
    found = choose(model, fit=fit, asked=asked)
    assert (found.checkpointing, found.batching.tokens_per_pack) == (checkpointing, tokens)
    assert found.batching.layout is BatchLayout.SHARED_PREFIX
    assert model.get_base_model().is_gradient_checkpointing == checkpointing


def test_a_resumed_run_makes_the_packs_of_the_first_attempt_where_they_fit() -> None:
    model = tiny("Llama", dropout=0.0)
    assert choose(model, fit=100_000, asked=None, earlier={"tokens_per_pack": 700}).batching.tokens_per_pack == 700
    assert choose(model, fit=2_600, asked=None, earlier={"tokens_per_pack": 4_096}).batching.tokens_per_pack == 2_560


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("heads", "layout"), [(2, BatchLayout.SINGLE_ROWS), (16, BatchLayout.SHARED_PREFIX)])
def test_rows_run_alone_where_an_indexer_could_choose_among_equals(heads: int, layout: BatchLayout) -> None:
    settings: dict[str, Any] = {**LATENT, **INDEXED, "index_topk": 300, "index_n_heads": heads}
    model = tiny("DeepseekV32", dropout=0.0, num_key_value_heads=4, **settings)
    found = choose(model, fit=100_000, asked=None)
    assert found.batching.layout is layout
    assert ("tells equals apart" in found.verdict.refused) == (layout is BatchLayout.SINGLE_ROWS)
