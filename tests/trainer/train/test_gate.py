"""The gate: a layout is used only where it computes what rows compute one by one, whatever the model is."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers.models.bloom import modeling_bloom

from finetune_api.outcome import BatchLayout, Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model import packed_attention
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import TokenPair, pad
from finetune_trainer.model.packing import behind_one_prefix, common_beginning
from finetune_trainer.model.prefix_cache import PrefixCache
from finetune_trainer.model.tree_attention import Scores, Sight
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.gate import Gate, Verdict
from finetune_trainer.train.sample import sample_of

VOCABULARY = 64
WINDOW = 20
BATCHING = Batching(BatchLayout.SHARED_PREFIX, tokens_per_pack=4096, rows_per_batch=2, pad_id=0)
MIXTURE = {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "targets": ["q_b_proj", "kv_b_proj", "o_proj"],
}
# So many heads that no two keys are equally good.
INDEXED = {"index_topk": WINDOW, "index_n_heads": 16, "index_head_dim": 16}
GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
FALCON = ["query_key_value", "dense"]
LOCAL = [[["global", "local"], 2]]
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}


def rows(*lengths: int, shared: int = 40) -> list[list[TokenPair]]:
    """Rows of `shared` equal tokens and `lengths` own ones, of which the last are trained."""
    generator = np.random.default_rng(0)
    prompt = generator.integers(3, VOCABULARY, shared)
    found = []
    for length in lengths:
        ids = np.concatenate([prompt, generator.integers(3, VOCABULARY, length)]).astype(np.int64)
        found.append([(ids, np.arange(len(ids)) >= shared + length // 3)])
    return found


def tiny(kind: str, *, targets: str | list[str] = "all-linear", dropout: float = 0.1, **settings: Any) -> Any:
    """A random model of an architecture, with an adapter that changes what it says."""
    kind_of_config = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = kind_of_config(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        }
    )
    torch.manual_seed(0)
    kind_of_model = getattr(transformers, f"{kind}ForCausalLM", None) or getattr(transformers, f"{kind}LMHeadModel")
    base = kind_of_model(config).requires_grad_(False)
    return get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=dropout))


def ready(model: Any) -> AdaptedModel:
    return AdaptedModel(model, torch.device("cpu"))


def test_packs_behind_a_prefix_that_are_not_exact_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    own = PrefixCache.add_gradients

    def loses_half(cache: PrefixCache) -> None:
        own(cache)
        cache._sums = {made: gradient / 2 for made, gradient in cache._sums.items()}

    monkeypatch.setattr(PrefixCache, "add_gradients", loses_half)
    verdict = chosen(tiny("Llama"), rows(31, 45, 52, 60), replace(BATCHING, prefixes=True))
    assert verdict.layout is SHARED
    assert not verdict.prefixes
    assert verdict.refused.startswith("computing a beginning once for several packs changes the loss by")


def chosen(model: Any, found: list[list[TokenPair]], batching: Batching = BATCHING) -> Verdict:
    return Gate(ready(model), Ranks()).choose(sample_of(found, 1024), batching)


def outcome(model: AdaptedModel, batches: list[Any]) -> tuple[float, torch.Tensor]:
    """Loss and whole gradient, without dropout."""
    model.peft.eval()
    model.peft.zero_grad()
    loss = float(model.backward(batches))
    return loss, torch.cat([p.grad.flatten() for p in model.trained if p.grad is not None])


SHARED = BatchLayout.SHARED_PREFIX
PADDED = BatchLayout.PADDED
OWN_ATTENTION = {"RoFormer", "GPTJ", "Bloom", "Falcon", "Mpt", "GPTNeo", "OpenAIGPT", "DeepseekV32"}
"""They take packs by a mask, which is of a pack's own tokens: none of others before it."""
STATES = {"Mamba", "Qwen3Next", "GraniteMoeHybrid", "Bamba", "Lfm2"}
"""Rows are computed whole, so nothing is shared."""


@pytest.mark.filterwarnings("ignore")  # each architecture has its own
@pytest.mark.parametrize(
    ("kind", "settings", "layout"),
    [
        ("Llama", {}, SHARED),
        ("Mistral", {"sliding_window": WINDOW}, SHARED),
        ("Qwen2Moe", {"num_experts": 4, **MIXTURE}, SHARED),
        ("Qwen3", {"head_dim": 8}, SHARED),
        ("Gemma", {"head_dim": 8}, SHARED),
        ("Phi3", {}, SHARED),
        ("GPTNeoX", {}, SHARED),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, SHARED),
        ("Olmo3", {"sliding_window": WINDOW}, SHARED),
        ("Cohere2", {"sliding_window": WINDOW}, SHARED),
        ("SmolLM3", {}, SHARED),
        # Heads of keys that are larger than those of values.
        ("DeepseekV3", {"dropout": 0.0, "num_key_value_heads": 4, **LATENT}, SHARED),
        # A cap on attention scores.
        ("Gemma2", {"head_dim": 8, "sliding_window": WINDOW}, SHARED),
        # Sinks beside the scores.
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": WINDOW}, SHARED),
        # Dropout of its own in attention.
        ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, SHARED),
        # Masks that it slices.
        ("Gemma4", GEMMA4, SHARED),
        # A decoder that transformers takes the head for.
        ("ModernBertDecoder", {"local_attention": WINDOW, "global_attn_every_n_layers": 2}, SHARED),
        # Places behind the padding's, counted by itself, and embeddings of them that nobody can name.
        ("Roberta", {"is_decoder": True}, SHARED),
        ("Bart", {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}, SHARED),
        ("Marian", {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}, SHARED),
        ("RoFormer", {"is_decoder": True}, SHARED),
        # Attention of their own: rotary, with ALiBi, with squares of which place sees which.
        ("GPTJ", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, SHARED),
        ("Bloom", {"n_layer": 2, "n_head": 4}, SHARED),
        ("Falcon", {"alibi": True, "targets": FALCON}, SHARED),
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, SHARED),
        ("GPTNeo", {"num_layers": 4, "num_heads": 4, "attention_types": LOCAL, "window_size": WINDOW}, SHARED),
        ("OpenAIGPT", {"n_embd": 32, "n_head": 4, "n_layer": 2}, SHARED),
        # The best of all keys that it may see.
        ("DeepseekV32", {"dropout": 0.0, "num_key_value_heads": 4, **LATENT, **INDEXED}, SHARED),
        # State-space, and mixtures of that and attention.
        ("Mamba", {"state_size": 8, "targets": ["in_proj", "x_proj"]}, PADDED),
        ("Qwen3Next", {"num_experts": 2, "dropout": 0.0, **MIXTURE, **LINEAR}, SHARED),
        ("GraniteMoeHybrid", {"layer_types": ["mamba", "attention"] * 2, **MAMBA}, SHARED),
        ("Bamba", {"attn_layer_indices": [1], **MAMBA}, SHARED),
        ("Lfm2", {"full_attn_idxs": [1]}, SHARED),
    ],
)
def test_every_architecture_trains_as_row_by_row(kind: str, settings: dict[str, Any], layout: BatchLayout) -> None:
    model, found = ready(tiny(kind, **settings)), rows(31, 45, 52, 60)
    wanted_loss, wanted = outcome(model, [pad(row, 0) for row in found])
    verdict = Gate(model, Ranks()).choose(sample_of(found, 1024), replace(BATCHING, prefixes=True))
    assert verdict.layout is layout
    assert verdict.prefixes is (layout is SHARED and kind not in OWN_ATTENTION | STATES)
    assert bool(verdict.refused) == (layout is not SHARED or kind in OWN_ATTENTION)
    if verdict.prefixes:
        prefixed: Any = behind_one_prefix([row[0] for row in found])
        loss, gradient = outcome(model, [prefixed])
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert torch.norm(gradient - wanted) <= 1e-5 * torch.norm(wanted)
    batching = Batching(verdict.layout, tokens_per_pack=100, rows_per_batch=2, pad_id=0)
    loss, gradient = outcome(model, batching.batches(found))
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert torch.norm(gradient - wanted) <= 1e-5 * torch.norm(wanted)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
XLNET = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
PROPHETNET = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_decoder_layers": 2,
    "num_encoder_layers": 1,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}


def adapted(kind: str, settings: dict[str, Any]) -> Any:
    """A random model of whatever class the configuration has."""
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Bert", {**SMALL, "intermediate_size": 64}),
        ("XLNet", XLNET),
        ("CpmAnt", {**SMALL, "dim_head": 8, "dim_ff": 64}),
    ],
)
@pytest.mark.parametrize("layout", [SHARED, PADDED])
def test_a_model_that_sees_what_it_is_to_predict_is_refused(
    kind: str, settings: dict[str, Any], layout: BatchLayout
) -> None:
    with pytest.raises(JobError, match="sees the tokens it is to predict") as refused:
        chosen(adapted(kind, settings), rows(31, 45), replace(BATCHING, layout=layout))
    assert refused.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_padding_changes_is_run_one_row_at_a_time() -> None:
    model, found = ready(adapted("ProphetNet", PROPHETNET)), rows(31, 45, 52, 60)
    wanted_loss, wanted = outcome(model, [pad(row, 0) for row in found])
    for batching in (BATCHING, replace(BATCHING, layout=PADDED), replace(BATCHING, layout=PADDED, length=128)):
        verdict = Gate(model, Ranks()).choose(sample_of(found, 1024), batching)
        assert verdict.layout is BatchLayout.SINGLE_ROWS
        assert "padding, or other rows beside a row, changes the loss by" in verdict.refused
        loss, gradient = outcome(model, replace(batching, layout=verdict.layout).batches(found))
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert torch.norm(gradient - wanted) <= 1e-6 * torch.norm(wanted)


def test_a_model_that_mixes_the_rows_of_a_batch_is_run_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mixtures of experts with a limited capacity do."""
    model = tiny("Llama")
    layer = model.get_base_model().model.layers[1].mlp
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda states: original(states - 0.1 * states.mean(dim=0, keepdim=True)))
    monkeypatch.setattr("finetune_trainer.model.packed_attention.in_pieces", None)
    assert chosen(model, rows(31, 45)).layout is BatchLayout.SINGLE_ROWS


def test_rows_all_of_a_length_are_compared_with_padding_too() -> None:
    assert len({len(ids) for ids, _ in sample_of(rows(60, 60, 60), 1024)}) > 1


def half_precision(kind: str, layers: int) -> AdaptedModel:
    """A model as it is on a GPU: bfloat16 with an adapter in float32."""
    model = tiny(kind, num_hidden_layers=layers)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return ready(model)


def test_rounding_in_half_precision_is_no_reason_to_pad() -> None:
    verdict = Gate(half_precision("Llama", 24), Ranks()).choose(sample_of(rows(31, 45), 1024), BATCHING)
    assert verdict.layout is SHARED
    assert (verdict.gradient_difference or 0) > 1e-2


def test_a_leak_that_rounding_hides_in_half_precision_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_precision("Llama", 4)
    sample = sample_of(rows(31, 45), 1024)
    layer = model.base.model.layers[1].mlp
    original = layer.forward

    def mixed(states: torch.Tensor) -> Any:
        # No row alone is as long as the pack.
        before = functional.pad(states, (0, 0, 1, 0))[:, :-1]
        return original(states + 0.02 * before if states.shape[1] > 100 else states)

    monkeypatch.setattr(layer, "forward", mixed)
    verdict = Gate(model, Ranks()).choose(sample, BATCHING)
    assert verdict.layout is PADDED
    assert verdict.refused.startswith("in a pack rows see each other")


def test_a_model_that_counts_places_itself_is_found_out() -> None:
    model = tiny("OPT", ffn_dim=64, word_embed_proj_dim=32)
    embedding = model.get_base_model().model.decoder.embed_positions
    original = embedding.forward

    def counted(attention_mask: torch.Tensor, past: int = 0, position_ids: torch.Tensor | None = None) -> Any:
        own = position_ids if position_ids is None else torch.arange(position_ids.shape[1])[None]
        return original(attention_mask, past, position_ids=own)

    embedding.forward = counted
    verdict = chosen(model, rows(31, 45))
    assert verdict.layout is PADDED
    assert "packing changes the loss by" in verdict.refused


Tiny = tuple[str, dict[str, Any]]
ALIBI: Tiny = ("Bloom", {"n_layer": 2, "n_head": 4})
LEARNED: Tiny = ("Bart", {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4})
CAPPED: Tiny = ("Gemma2", {"head_dim": 8, "attn_logit_softcapping": 0.05})
SINKS: Tiny = ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": WINDOW})


def along_the_pack(pack: Any, arguments: dict[str, Any]) -> Sight | None:
    """In place of `_sight`: windows by order in the pack, in which the place of a token cannot be told."""
    reach = arguments.get("local_size")
    return None if reach is None else Sight(lambda _b, _h, q, kv: kv % 2 == q % 2, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "name", "wrong", "layout"),
    [
        (LEARNED, "follow_places", lambda *_: None, PADDED),
        (("Mistral", {"sliding_window": WINDOW}), "_sight", lambda *_: None, PADDED),
        (("Mistral", {"sliding_window": WINDOW}), "_sight", along_the_pack, PADDED),
        (ALIBI, "tree_mask", lambda pack, _sight: torch.ones(pack.tokens, pack.tokens).tril().bool(), PADDED),
        (SINKS, "Scores", lambda **named: Scores(**{**named, "sinks": None}), PADDED),
        (CAPPED, "Scores", lambda **named: Scores(**{**named, "cap": None}), PADDED),
        (CAPPED, "Scores", lambda **named: Scores(**{**named, "scale": 0.3}), PADDED),
    ],
    ids=["places", "no-window", "other-window", "no-tree", "sinks", "cap", "scale"],
)
def test_what_attention_forgets_is_found_out(
    model: Tiny,
    name: str,
    wrong: Any,
    layout: BatchLayout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, settings = model
    assert chosen(tiny(kind, **settings), rows(31, 45)).layout is SHARED
    monkeypatch.setattr(packed_attention, name, wrong)
    assert chosen(tiny(kind, **settings), rows(31, 45)).layout is layout


@pytest.mark.filterwarnings("ignore")
def test_alibi_that_counts_along_the_pack_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = ALIBI
    monkeypatch.setattr(modeling_bloom, "build_alibi_tensor", inspect.unwrap(modeling_bloom.build_alibi_tensor))
    monkeypatch.setattr(packed_attention, "follow_places", lambda *_: None)
    # Beside each other rows keep their distances.
    assert chosen(tiny(kind, **settings), rows(31, 45)).layout is BatchLayout.PACKED


def test_masks_that_a_model_makes_of_others_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Mistral", sliding_window=WINDOW)
    layer = model.get_base_model().model.layers[1].self_attn
    original = layer.forward

    def changed(*args: Any, attention_mask: Any = None, **others: Any) -> Any:
        mask = attention_mask if attention_mask is None else attention_mask.clone()
        return original(*args, attention_mask=mask, **others)

    monkeypatch.setattr(layer, "forward", changed)
    verdict = chosen(model, rows(31, 45))
    assert verdict.layout is PADDED
    assert "it changes its masks" in verdict.refused


def mixed_with_the_token_before(original: Any) -> Any:
    return lambda states: original(states + 0.1 * functional.pad(states, (0, 0, 1, 0))[:, :-1])


def test_a_model_that_mixes_tokens_behind_its_layers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama")
    norm = model.get_base_model().model.norm
    original = norm.forward
    monkeypatch.setattr(norm, "forward", lambda states: original(states + 0.1 * states.cumsum(dim=1)))
    assert chosen(model, rows(31, 45)).layout is PADDED


def test_a_layer_that_mixes_neighbouring_tokens_is_given_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = ready(tiny("Llama")), rows(31, 45)
    layer = model.base.model.layers[1].mlp
    monkeypatch.setattr(layer, "forward", mixed_with_the_token_before(layer.forward))
    wanted_loss, wanted = outcome(model, [pad(row, 0) for row in found])
    verdict = Gate(model, Ranks()).choose(sample_of(found, 1024), BATCHING)
    assert verdict.layout is SHARED
    assert verdict.rows_apart == 1
    loss, gradient = outcome(model, BATCHING.batches(found))
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert torch.norm(gradient - wanted) <= 1e-5 * torch.norm(wanted)


def test_packing_without_sharing_is_tried_before_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings that count places themselves are wrong where a row branches off, and right where it begins
    anew: only distances matter.
    """
    model = tiny("Llama")
    rotary = model.get_base_model().model.rotary_emb
    original = rotary.forward
    monkeypatch.setattr(
        rotary, "forward", lambda states, position_ids: original(states, torch.arange(position_ids.shape[1])[None])
    )
    verdict = chosen(model, rows(31, 45))
    assert verdict.layout is BatchLayout.PACKED
    assert "computing common beginnings once changes" in verdict.refused


def test_a_kernel_that_fails_means_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise NotImplementedError("no kernel for this head size")

    monkeypatch.setattr("finetune_trainer.model.packed_attention.in_pieces", broken)
    model = tiny("Llama")
    verdict = chosen(model, rows(31, 45))
    assert verdict.layout is PADDED
    assert (
        verdict.refused == "rows cannot be computed together here (NotImplementedError: no kernel for this head size)"
    )


def test_the_gate_leaves_the_model_as_it_was() -> None:
    model = tiny("Llama").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    chosen(model, rows(31, 45))
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_sample_holds_the_most_alike_the_longest_and_the_shortest() -> None:
    found = rows(30, 50, 70, shared=0) + rows(20, 22)
    lengths = sorted(len(ids) for ids, _ in sample_of(found, 1024))
    assert lengths == [30, 60, 62, 70]


def test_a_sample_without_common_beginnings_gets_one() -> None:
    first, second, *_ = sample_of(rows(40, 60, shared=0), 1024)
    assert common_beginning(first[0], second[0]) == 30


@pytest.mark.parametrize("shared", [0, 40, 3000])
def test_a_sample_of_long_rows_is_cut(shared: int) -> None:
    sample = sample_of(rows(300, 400, 5000, shared=shared), 200)
    assert sum(len(ids) for ids, _ in sample) <= 200
    assert common_beginning(sample[0][0], sample[1][0]) >= 33
    assert all(trained[1:].any() for _, trained in sample)


def test_one_row_is_enough() -> None:
    assert len(sample_of(rows(500), 200)) == 2
