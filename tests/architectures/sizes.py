"""How a published configuration becomes a tiny one: by the name of each setting, whatever the family.

A setting that a family does not have is not asked for. What these rules make of a family is corrected, where it would
miss one of its layer kinds or not fit together, in `families.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY = 512
"""Rows of the embedding; the tokenizer has fewer ids, as published models have it."""

LAYERS = 4
"""Enough for two kinds of attention and two kinds of feed-forward in every combination."""

_BY_NAME: dict[str, tuple[str, ...]] = {
    # Every projection that may differ in size differs, so that one taken for another is noticed.
    "64": (
        "hidden_size",
        "d_model",
        "n_embd",
        "emb_dim",
        "word_embed_proj_dim",
        "attention_hidden_size",
        "embedding_size",
    ),
    "96": (
        *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_inner", "dff"),
        *("dim_ff", "feed_forward_size", "dense_intermediate_size", "intermediate_size_mlp"),
    ),
    "32": (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
        *("shared_experts_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
        *("hidden_size_per_layer_input", "router_hidden_size", "prefix_dense_intermediate_size"),
    ),
    "16": (
        *("head_dim", "attention_head_size", "d_head", "dim_head", "kv_channels", "v_head_dim", "swa_head_dim"),
        # Fewer heads of an indexer give many tokens the same score, exactly 0, and chance chooses among them.
        "index_n_heads",
        *("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim", "indexer_head_dim"),
        *("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"),
        *("mamba_d_state", "mamba_d_head", "mamba_head_dim", "ssm_state_size", "state_size", "mamba_dt_rank"),
        *(
            "time_step_rank",
            "mamba_chunk_size",
            "chunk_size",
            "block_size",
            "laurel_rank",
            "hc_lowrank",
            "adapter_rank",
        ),
    ),
    "8": (
        *("qk_rope_head_dim", "qk_nope_head_dim", "sliding_window", "sliding_window_size", "window_size"),
        *("attention_window_size", "local_attention", "attention_chunk_size", "index_topk", "rotary_dim"),
        *("mamba_n_heads", "mamba_num_heads", "d_rel", "rel_extent", "gated_norm_rank"),
    ),
    str(LAYERS): (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads"),
        *("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
        *("swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim", "conv_kernel_size"),
    ),
    "2": (
        *("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads"),
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
        *("n_group", "num_expert_group", "n_groups", "mamba_n_groups", "hc_mult", "hc_count", "encoder_layers"),
        *("num_encoder_layers", "o_groups", "mamba_expand", "expand"),
    ),
    "1": (
        *("topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"),
        *("num_dense_layers", "moe_layer_start_index"),
    ),
    "512": (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions"),
        "model_max_length",
    ),
    str(VOCABULARY): ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
}

SIZES: dict[str, int] = {name: int(size) for size, names in _BY_NAME.items() for name in names}

SPREAD = {"initializer_range": 0.1, "init_std": 0.1}
"""Weights so large that attention is not nearly uniform and a wrong mask is no rounding error."""

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""The ids in `tokenizer.py`."""


def shrunk(config: Any) -> dict[str, Any]:
    """The settings that make `config`, of a published size, a tiny one."""
    # Not by getattr, which refuses settings that differ between layers.
    stored = {field.name: config.attribute_map.get(field.name, field.name) for field in dataclasses.fields(config)}
    published = {name: vars(config).get(place) for name, place in stored.items()}
    rules: dict[str, Any] = {**SIZES, **SPREAD}
    found = {name: value for name, value in rules.items() if published.get(name) is not None}
    always = {**SPECIAL_TOKENS, "head_dim": SIZES["head_dim"]}
    found |= {name: value for name, value in always.items() if name in published}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"):
        if published.get(name):
            kinds = list(dict.fromkeys(published[name]))
            # Kinds of attention take turns; feed-forward layers are dense first, and then sparse to the end.
            turns = kinds[:1] + kinds[1:] * LAYERS if name == "mlp_layer_types" and len(kinds) > 1 else kinds * LAYERS
            found[name] = turns[:LAYERS]
    if "kv_lora_rank" in published:
        # Latent attention has no groups, and names the rotary part of a head by itself.
        found |= {name: value for name, value in (("num_key_value_heads", 4), ("head_dim", 8)) if name in found}
    return found
