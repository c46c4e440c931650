"""Packs of rows compute what the rows compute one by one: on any tree, loss and every gradient of the adapter."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.model import flex_tree
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import TokenPair, pad
from finetune_trainer.model.flex_tree import flex
from finetune_trainer.model.packed_attention import PackedDecoder, PackingRefusedError, most_tokens
from finetune_trainer.model.prefix_tree import Pack, packs_of
from finetune_trainer.model.tree_attention import Scores, Sight, by_path, dense, in_pieces, tree_mask

VOCABULARY = 50
CLOSE = 1e-5
"""Relative, on the whole gradient."""


@st.composite
def trees(draw: st.DrawFn) -> list[TokenPair]:
    """Rows that leave each other's path at random places."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows: list[TokenPair] = []
    for _ in range(draw(st.integers(1, 7))):
        start = rows[draw(st.integers(0, len(rows) - 1))][0] if rows else np.zeros(0, dtype=np.int64)
        kept = start[: draw(st.integers(0, len(start)))]
        own = generator.integers(0, VOCABULARY, draw(st.integers(1, 60)))
        ids = np.concatenate([kept, own]).astype(np.int64)
        rows.append((ids, generator.random(len(ids)) < draw(st.sampled_from([0.0, 0.1, 1.0]))))
    return rows


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Mistral", {"sliding_window": None}),
    "sliding": ("Mistral", {"sliding_window": 20}),
    "capped": ("Gemma2", {"head_dim": 8, "sliding_window": 20, "attn_logit_softcapping": 0.5}),
    "sinks": ("GptOss", {"head_dim": 8, "sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "arguments-kept": ("StableLm", {}),  # its layers hand on nothing to their attention
    "alibi": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "squares": ("GPTNeo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 20}),
    "learned-places": ("Bart", {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "is_decoder": True}),
}


@functools.cache
def tiny(name: str) -> AdaptedModel:
    """One of `MODELS` with an adapter that changes what it says."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "decoder_attention_heads": 4,
            "num_heads": 4,
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "embed_dropout": 0.0,
            "resid_dropout": 0.0,
            "pad_token_id": 0,
            **settings,
        }
    )
    base = getattr(transformers, f"{kind}ForCausalLM")(config).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return AdaptedModel(model.train(), torch.device("cpu"))


def outcome(
    model: AdaptedModel, rows: list[TokenPair], *, budget: int | None, share: bool = True
) -> tuple[float, torch.Tensor]:
    """Loss and whole gradient; without a budget by the model's own forward, row by row."""
    model.peft.zero_grad()
    if budget is None:
        total = model.backward([pad([row], 0) for row in rows])
    else:
        model.take_packs()
        total = model.backward(packs_of(rows, budget=budget, share=share))
        model.leave_packs()
    gradients = [each.grad.flatten() for each in model.trained if each.grad is not None]
    return float(total), torch.cat(gradients)


@pytest.mark.filterwarnings("ignore")  # each architecture has its own
@pytest.mark.parametrize("name", ["sliding", "arguments-kept", "alibi", "squares", "learned-places"])
def test_layers_that_are_computed_again_on_another_thread_find_their_pack(name: str) -> None:
    """On GPUs the backward pass has threads of its own; here it is put on one."""
    model = tiny(name)
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, VOCABULARY, 30) for _ in range(3)]
    rows = [(np.concatenate([ids[0], each]), np.arange(60) > 25) for each in ids]
    wanted_loss, wanted = outcome(model, rows, budget=1000)
    model.peft.zero_grad()
    assert model.checkpoint_activations()
    try:
        model.take_packs()
        (pack,) = packs_of(rows, budget=1000, share=True)
        loss, _ = model.loss(pack)
        thread = threading.Thread(target=torch.autograd.backward, args=(loss,))
        thread.start()
        thread.join()
    finally:
        model.leave_packs()
        model.base.gradient_checkpointing_disable()
    found = torch.cat([each.grad.flatten() for each in model.trained if each.grad is not None])
    assert float(loss) == pytest.approx(wanted_loss)
    assert torch.norm(found - wanted) <= CLOSE * torch.norm(wanted)


@pytest.mark.filterwarnings("ignore")  # each architecture has its own
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
@settings(max_examples=10, deadline=None)
@given(rows=trees(), budget=st.sampled_from([1, 64, 10_000]))
def test_loss_and_gradients_are_those_of_one_row_at_a_time(
    name: str, share: bool, rows: list[TokenPair], budget: int
) -> None:
    model = tiny(name)
    loss, gradient = outcome(model, rows, budget=None)
    packed_loss, packed_gradient = outcome(model, rows, budget=budget, share=share)
    assert packed_loss == pytest.approx(loss, rel=CLOSE)
    assert torch.norm(packed_gradient - gradient) <= CLOSE * torch.norm(gradient)


WINDOW = Sight(lambda _b, _h, q, kv: q - kv < 9, 9)
CHUNKS = Sight(lambda _b, _h, q, kv: q // 9 == kv // 9, 9)
SCORES = {
    "plain": Scores(0.25),
    "cap": Scores(0.25, cap=1.5),
    "sinks": Scores(0.25, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "bias": Scores(0.25, bias=torch.randn(1, 4, 1, 500, generator=torch.Generator().manual_seed(0))),
}


def attended(kind: str, pack: Pack, sight: Sight | None, scores: Scores, *tensors: torch.Tensor) -> Any:
    query, key, value = tensors
    if kind == "dense":
        return dense(query, key, value, tree_mask(pack, sight), scores)
    if kind == "in_pieces":
        return in_pieces(query, key, value, pack, scores)
    return (flex if kind == "flex" else by_path)(query, key, value, pack, sight, scores)


# Compiling takes a compiler and minutes; the tree is the same without.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sight", [None, WINDOW, CHUNKS], ids=["whole", "window", "chunks"])
@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=5, deadline=None)
@given(rows=trees())
def test_all_kinds_of_attention_agree(name: str, sight: Sight | None, rows: list[TokenPair]) -> None:
    (pack,) = packs_of(rows, budget=10_000, share=True)
    size = pack.input_ids.shape[1]
    scores = SCORES[name]
    scores = replace(scores, bias=None if scores.bias is None else scores.bias[..., :size])
    shapes = (1, 4, size, 16), (1, 2, size, 16), (1, 2, size, 8)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    learned = [*tensors, scores.sinks.double().requires_grad_()] if scores.sinks is not None else tensors
    scores = replace(scores, sinks=learned[3] if scores.sinks is not None else None)
    weight = torch.randn(1, 4, size, 8, dtype=torch.float64)

    def outcome(kind: str) -> list[torch.Tensor]:
        if kind == "flex":  # It has no backward pass on a CPU.
            fixed = replace(scores, sinks=None if scores.sinks is None else scores.sinks.detach())
            return [attended(kind, pack, sight, fixed, *(tensor.detach() for tensor in tensors))]
        out = attended(kind, pack, sight, scores, *tensors)
        return [out, *torch.autograd.grad((out * weight).sum(), learned)]

    wanted = outcome("dense")
    kinds = ["by_path"]
    kinds += ["in_pieces"] if sight is None and name in ("plain", "sinks") else []
    kinds += ["flex"] if name != "bias" else []
    for kind in kinds:
        for found, right in zip(outcome(kind), wanted, strict=False):
            torch.testing.assert_close(found, right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("sight", [None, WINDOW, CHUNKS], ids=["whole", "window", "chunks"])
@settings(max_examples=50, deadline=None)
@given(rows=trees(), block=st.sampled_from([2, 8, 128]))
def test_the_block_mask_is_the_tree(sight: Sight | None, rows: list[TokenPair], block: int) -> None:
    (pack,) = packs_of(rows, budget=10_000, share=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_tree, "_BLOCK", block)
        flex_tree._block_mask.cache_clear()
        found = flex_tree._block_mask(pack, sight)
        flex_tree._block_mask.cache_clear()
    wanted = tree_mask(pack, sight)
    size = -(-pack.tokens // block)
    squares = torch.nn.functional.pad(wanted, (0, -pack.tokens % block) * 2).view(size, block, size, block)
    full, touched = squares.all(3).all(1), squares.any(3).any(1)

    def listed(numbers: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        there = torch.zeros(size, size, dtype=torch.bool)
        for row in range(size):
            there[row, columns[0, 0, row, : numbers[0, 0, row]].long()] = True
        return there

    partly, wholly = (
        listed(found.kv_num_blocks, found.kv_indices),
        listed(found.full_kv_num_blocks, found.full_kv_indices),
    )
    assert not (partly & wholly).any()
    assert not (wholly & ~full).any(), "in full blocks nothing is masked"
    assert not (touched & ~(partly | wholly)).any(), "what is attended to is computed"
    if sight is None:
        assert int((partly | wholly).sum()) <= int(touched.sum()) + size, "little else is"
    elif len(rows) == 1:
        most = 2 + (9 - 1) // block
        assert int((partly | wholly).sum(1).max()) <= most, "what a window cannot reach is skipped"


@given(rows=trees(), budget=st.integers(1, 200))
def test_every_target_of_every_row_is_there_once(rows: list[TokenPair], budget: int) -> None:
    packs = packs_of(rows, budget=budget, share=True)
    wanted = sorted(int(i) for ids, trained in rows for i in ids[1:][trained[1:]])
    assert sorted(int(i) for pack in packs for i in pack.targets) == wanted


def test_a_shared_prompt_is_stored_once() -> None:
    prompt = np.arange(40)
    rows = [(np.concatenate([prompt, [40 + i] * 5]), np.arange(45) >= 42) for i in range(4)]
    (shared,) = packs_of(rows, budget=1_000, share=True)
    assert shared.input_ids.shape[1] == 40 + 4 * 4  # the last token of a row predicts nothing
    (plain,) = packs_of(rows, budget=1_000, share=False)
    assert plain.input_ids.shape[1] == 4 * 44


@pytest.mark.parametrize(
    ("kind", "settings", "bound"),
    [
        ("Llama", {}, None),
        # All scores at once: as many as is worth it.
        ("Bloom", {"hidden_size": 32}, 512),
        ("Bloom", {"hidden_size": 1024}, 1024),
        ("Bloom", {"hidden_size": 4096}, 2048),
        # Where what is computed is counted, or where of equal keys the first are taken.
        ("Llama4Text", {"floor_scale": 100}, 99),
        ("DeepseekV32", {"index_topk": 300}, 300),
    ],
)
def test_packs_are_bounded_where_a_model_computes_attention_itself(
    kind: str, settings: dict[str, Any], bound: int | None
) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=1, **settings)
    with torch.device("meta"):
        assert most_tokens(transformers.AutoModelForCausalLM.from_config(config)) == bound


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("Mamba", {}, "all its layers carry a state"),
        ("DeepseekV4", {"layer_types": ["compressed_sparse_attention"] * 2}, "compressed_sparse_attention layers"),
    ],
)
def test_layers_that_no_mask_describes_are_refused(kind: str, settings: dict[str, Any], reason: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, num_hidden_layers=2, **settings)
    with torch.device("meta"), pytest.raises(PackingRefusedError, match=reason):
        PackedDecoder(transformers.AutoModelForCausalLM.from_config(config))
