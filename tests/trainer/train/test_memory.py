"""How many tokens a pack may have, and whether activations are checkpointed, follow from what fits."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from finetune_api.outcome import BatchLayout
from finetune_trainer.model.batch import pad
from finetune_trainer.model.packing import packs_of
from finetune_trainer.model.prefix_cache import PrefixCache
from finetune_trainer.train import choice as choices
from finetune_trainer.train import memory
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.gate import without_dropout
from tests.architectures.zoo import MODEL_TYPES, tiny_config
from tests.trainer.train.test_gate import INDEXED, LATENT, ready, rows, tiny

CPU = torch.device("cpu")
BATCHING = Batching(BatchLayout.SHARED_PREFIX, tokens_per_pack=0, rows_per_batch=2, pad_id=0)


def test_what_is_kept_grows_with_tokens_and_counts_no_weights() -> None:
    model = ready(tiny("Llama", dropout=0.0))
    found = []
    for length in (64, 128):
        counter = memory.KeptBytes(model.peft)
        with without_dropout(model.peft), counter.counting():
            model.backward([pad(rows(length, shared=0)[0], 0)])
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


def choose(
    model: Any,
    *,
    fit: int,
    asked: bool | None,
    earlier: dict[str, Any] | None = None,
    batching: Batching = BATCHING,
) -> Choice:
    """The choice on a device where `fit` tokens fit without checkpointing, and eight times as many with it."""
    adapted = ready(model)
    full = choices._kept_bytes_per_token(adapted, rows(60)[0][0], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            choices,
            "tokens_that_fit",
            lambda bytes_per_token, **_: fit if bytes_per_token > 0.9 * full else 8 * fit,
        )
        found = rows(31, 45, 60)
        return choices.choose(adapted, Ranks(), found, batching, checkpointing=asked, longest=2500, earlier=earlier)


def test_logits_and_weights_that_are_gathered_do_not_count_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there once for any number of tokens: on the output head of a large vocabulary thousands of times more
    than a token's share.
    """
    model = ready(tiny("Llama", dropout=0.0))
    wanted = choices._kept_bytes_per_token(model, rows(200)[0][0], 0)
    head = model.base.lm_head
    weight = head.weight
    monkeypatch.setattr(head, "forward", lambda states: functional.linear(states, weight.clone()))
    assert choices._kept_bytes_per_token(model, rows(200)[0][0], 0) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    ("fit", "asked", "checkpointed", "tokens"),
    [
        (100_000, None, 0, 4096),
        (2_600, None, 0, 2_560),
        # The longest row would not fit.
        (2_300, None, 2, 4096),
        (400, None, 2, 3_072),
        # Nor would it with half of the layers.
        (200, None, 1, 1_536),
        (400, True, 1, 3_072),
        (400, False, 0, 256),
    ],
)
def test_activations_are_checkpointed_of_as_few_layers_as_let_the_longest_row_fit(
    fit: int, asked: bool | None, checkpointed: int, tokens: int
) -> None:
    model = tiny("Llama", dropout=0.0)
    found = choose(model, fit=fit, asked=asked)
    assert (found.checkpointed, found.batching.tokens_per_pack) == (checkpointed, tokens)
    assert found.batching.layout is BatchLayout.SHARED_PREFIX
    layers = [layer.gradient_checkpointing for layer in model.get_base_model().model.layers]
    assert layers == [checkpointed > 0 and number % checkpointed == 0 for number in range(4)]


def test_layers_that_keep_their_activations_keep_what_is_estimated_and_gradients_stay_the_same() -> None:
    model = ready(tiny("Llama", dropout=0.0, num_hidden_layers=8))
    batch = pad(rows(160, shared=0)[0], 0)
    kept, gradients = {}, {}
    for every in (0, 4, 2, 1):
        if every:
            assert model.checkpoint_activations(every)
        counter = memory.KeptBytes(model.peft)
        with without_dropout(model.peft):
            with counter.counting():
                loss, _ = model.loss(batch)
            # It counts what is computed again, too.
            torch.autograd.backward(loss)
        gradients[every] = torch.cat([parameter.grad.flatten() for parameter in model.trained])  # type: ignore[union-attr]
        model.peft.zero_grad()
        kept[every] = counter.total
    # Less what the output head keeps.
    whole = (kept[0] - kept[1]) / 160
    for every, again in ((4, 2), (2, 4), (1, 8)):
        torch.testing.assert_close(gradients[every], gradients[0])
        # What a layer that is computed again gets is held by the layer's call, which nobody counts here.
        estimate = memory.checkpointed_bytes_per_token(model.base.config, whole, torch.float32, every)
        counted = (kept[every] - kept[1]) / 160 + again * 32 * 4 + whole / 8
        assert estimate == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("shared", "prefixes"), [(300, True), (60, False)])
def test_what_rows_of_several_packs_begin_with_is_computed_once_where_that_is_less_work(
    shared: int, prefixes: bool
) -> None:
    model = ready(tiny("Llama", dropout=0.0, max_position_embeddings=1024))
    found = choices.choose(
        model, Ranks(), rows(*[60] * 8, shared=shared), BATCHING, checkpointing=None, longest=360, bound=512
    )
    assert found.batching.layout is BatchLayout.SHARED_PREFIX
    assert found.batching.prefixes is prefixes
    assert found.warning() is None


@pytest.mark.filterwarnings("ignore")  # the architecture has its own
def test_nothing_lies_behind_a_prefix_where_places_are_counted_from_where_a_pass_begins() -> None:
    """Llama 4 scales queries by their place among what is computed."""
    settings: dict[str, Any] = {"floor_scale": 256, "attn_temperature_tuning": True, "num_local_experts": 2}
    settings |= {"intermediate_size_mlp": 64, "head_dim": 8, "max_position_embeddings": 1024, "dropout": 0.0}
    model = ready(tiny("Llama4", targets=["q_proj", "v_proj"], **settings))
    found = choices.choose(model, Ranks(), rows(*[60] * 8, shared=150), BATCHING, checkpointing=None, longest=800)
    assert found.batching.tokens_per_pack == 255
    assert not found.batching.prefixes


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_prefix_takes_the_memory_of_what_is_kept_of_it(checkpointed: bool) -> None:
    model = ready(tiny("Llama", dropout=0.0))
    model.take_packs()
    ids = rows(60, shared=150)[0][0][0]
    kept = []
    for tokens in (100, 200):
        cache = PrefixCache()
        (pack,) = packs_of([(ids[:tokens], np.arange(tokens) == tokens - 1)], budget=1000, share=True)
        model._loss_of_pack(pack, cache)
        kept.append(sum(each.numel() for made in cache._made.values() for each in made))
    model.leave_packs()
    # Keys and values of a token, and as many sums in float32.
    each = (kept[1] - kept[0]) / 100 * (4 + 4 * checkpointed)
    config = model.base.config
    assert memory.prefix_bytes_per_token(config, torch.float32, checkpointed=checkpointed) == each


@pytest.mark.parametrize(("fit", "before", "tokens"), [(100_000, 700, 700), (2_600, 4_096, 2_560)])
def test_a_resumed_run_makes_the_packs_of_the_first_attempt_where_they_fit(fit: int, before: int, tokens: int) -> None:
    model = tiny("Llama", dropout=0.0)
    found = choose(model, fit=fit, asked=None, earlier={"tokens_per_pack": before})
    assert found.batching.tokens_per_pack == tokens


@pytest.mark.parametrize(
    ("fit", "length", "rows_per_batch"),
    [(100_000, None, 16), (30_000, None, 8), (5_200, None, 2), (2_600, None, 1), (300, None, 1), (30_000, 4_000, 4)],
)
def test_of_padded_rows_no_more_lie_in_a_batch_than_fit_with_the_longest_among_them(
    fit: int, length: int | None, rows_per_batch: int
) -> None:
    """The longest has 2500 tokens. A power of two, so that a little more or less memory makes the same batches."""
    padded = replace(BATCHING, layout=BatchLayout.PADDED, rows_per_batch=16, length=length)
    found = choose(tiny("Llama", dropout=0.0), fit=fit, asked=False, batching=padded)
    assert found.batching.layout is BatchLayout.PADDED
    assert found.batching.rows_per_batch == rows_per_batch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("heads", "layout"), [(2, BatchLayout.SINGLE_ROWS), (16, BatchLayout.SHARED_PREFIX)])
def test_rows_run_alone_where_an_indexer_could_choose_among_equals(heads: int, layout: BatchLayout) -> None:
    settings: dict[str, Any] = {**LATENT, **INDEXED, "index_topk": 300, "index_n_heads": heads}
    model = tiny("DeepseekV32", dropout=0.0, num_key_value_heads=4, **settings)
    found = choose(model, fit=100_000, asked=None)
    assert found.batching.layout is layout
    assert ("tells equals apart" in found.verdict.refused) == (layout is BatchLayout.SINGLE_ROWS)


@pytest.mark.filterwarnings("ignore")  # each architecture has its own
def test_what_a_prefix_takes_is_known_of_every_type_of_model() -> None:
    seen = 0
    for kind in MODEL_TYPES:
        try:
            config = tiny_config(kind).get_text_config()
        except ValueError:
            continue  # Several parts are texts: no model that gets as far.
        seen += memory.prefix_bytes_per_token(config, torch.bfloat16, checkpointed=True) > 0
    assert seen > 150
