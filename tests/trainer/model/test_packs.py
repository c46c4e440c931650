"""Packs of rows compute what the rows compute one by one: on any tree, loss and every gradient of the adapter."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.model import packing
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import TokenPair, pad
from finetune_trainer.model.packed_attention import PackedDecoder, PackingRefusedError, most_tokens
from finetune_trainer.model.packing import behind_one_prefix, packs_of, prefixed_packs_of
from tests.trainer.model.row_trees import VOCABULARY, behind, trees

CLOSE = 1e-5
"""Relative, on the whole gradient."""


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
@pytest.mark.parametrize("name", ["full", "sliding", "capped", "sinks", "arguments-kept"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@settings(max_examples=10, deadline=None)
@given(rows=trees(), prefix=st.integers(0, 40), budget=st.sampled_from([1, 64, 10_000]))
def test_packs_behind_what_they_begin_with_have_loss_and_gradients_of_one_row_at_a_time(
    name: str, again: bool, rows: list[TokenPair], prefix: int, budget: int
) -> None:
    model = tiny(name)
    rows = behind(prefix, rows)
    wanted_loss, wanted = outcome(model, rows, budget=None)
    model.peft.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        # So that it is worth it for a few tokens.
        patch.setattr(packing, "_PACK_COST", 2)
        forced = behind_one_prefix(rows)
        batches = [forced] if budget == 1 and forced else prefixed_packs_of(rows, budget=budget)
    if again:
        assert model.checkpoint_activations()
    try:
        model.take_packs()
        loss = float(model.backward(batches))
        with torch.no_grad():
            evaluated = sum(float(model.loss(batch)[0]) for batch in batches)
    finally:
        model.leave_packs()
        model.base.gradient_checkpointing_disable()
    found = torch.cat([each.grad.flatten() for each in model.trained if each.grad is not None])
    assert loss == pytest.approx(wanted_loss, rel=CLOSE)
    assert evaluated == pytest.approx(wanted_loss, rel=CLOSE)
    assert torch.norm(found - wanted) <= CLOSE * torch.norm(wanted)


@pytest.mark.filterwarnings("ignore")  # each architecture has its own
@pytest.mark.parametrize("name", ["alibi", "squares", "learned-places"])
def test_a_model_that_computes_attention_itself_takes_no_packs_behind_a_prefix(name: str) -> None:
    model = tiny(name)
    prefixed = behind_one_prefix(
        behind(9, [(np.arange(1, 9), np.arange(8) > 3), (np.arange(11, 19), np.arange(8) > 3)])
    )
    assert prefixed is not None
    try:
        model.take_packs()
        if name == "learned-places":  # BART asks for its attention.
            model.backward([prefixed])
        else:
            with pytest.raises(PackingRefusedError, match="computes its attention itself"):
                model.backward([prefixed])
    finally:
        model.leave_packs()


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
