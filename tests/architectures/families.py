"""What each family needs beyond `sizes.py`: its special layer kinds switched on, and sizes that have to fit together.

A key that names a part of the configuration (`text_config`) holds that part's settings.
"""

from __future__ import annotations

from typing import Any

from transformers import Gemma4TextConfig

from tests.architectures.sizes import shrunk

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
_LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2

_DECODER: dict[str, Any] = {"is_decoder": True}
"""Of encoders that are published as such: the switch that makes them causal."""

_DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]

_GEMMA4 = {
    "layer_types": _SLIDING_AND_FULL,
    "num_kv_shared_layers": 2,
    "attention_k_eq_v": True,
    # One number for layers of full attention, another for the rest.
    "per_layer_config": {1: {"head_dim": 32, "num_key_value_heads": 1}, 3: {"head_dim": 32, "num_key_value_heads": 1}},
}
_GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
_GEMMA4_DRAFTER = _GEMMA4 | {"num_kv_shared_layers": 4}

_QWEN_VISION = {
    "depth": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 2,
}
_DOTS3_NOTE = {
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "mlp_layer_types": _DENSE_FIRST,
    "per_layer_config": {
        layer: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 24, "head_dim": 16}
        for layer in (1, 3)
    },
}
_LLAMA4 = {"moe_layers": [1, 3], "no_rope_layers": [1, 1, 0, 1], "floor_scale": 16, "attn_scale": 0.1}
_GEMMA3N = {
    "layer_types": _SLIDING_AND_FULL,
    "num_kv_shared_layers": 2,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}
_PATCHES = {"image_size": 32, "patch_size": 8}
"""Sixteen of them."""
_SMALL_AUDIO_CODEC = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    # Encoders with a language model head.
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": _DECODER,
    "camembert": _DECODER,
    "data2vec-text": _DECODER,
    "electra": _DECODER,
    "ernie": _DECODER | {"use_task_id": True},
    "megatron-bert": _DECODER,
    "rembert": _DECODER | {"input_embedding_size": 32, "output_embedding_size": 48},
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": _DECODER
    | {"pronunciation_vocab_size": 512, "shape_vocab_size": 512, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "roformer": _DECODER,
    "xlm": {"causal": True},
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xlnet": {"attn_type": "uni"},
    "xmod": _DECODER | {"default_language": "en_XX"},
    "reformer": _DECODER
    | {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [24, 40],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    # Text decoders.
    "afmoe": {"layer_types": _SLIDING_AND_FULL, "global_attn_every_n_layers": 2},
    "axk1": {"mlp_layer_types": _DENSE_FIRST},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "patcher_config": {"num_key_value_heads": 4},
        "encoder_config": {"num_key_value_heads": 4, "hidden_size_global": 64},
        "decoder_config": {"num_key_value_heads": 4, "hidden_size_global": 64},
        "global_config": {"num_key_value_heads": 4, "encoder_cross_output_size": 128},
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "cohere2_moe": {"num_shared_experts": 1, "mlp_layer_types": _DENSE_FIRST},
    "cohere": {"use_qk_norm": True},
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "cpmant": {"prompt_types": 4, "prompt_length": 8, "segment_types": 4, "init_std": 0.1},
    "ctrl": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "num_key_value_heads": 1,
    },
    # Its experts are chosen with a look at later tokens: `NOT_CAUSAL`.
    "doge": {"keep_window_size": 512},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_types": _SLIDING_AND_FULL,
    },
    "dots3_note_text": _DOTS3_NOTE,
    "ernie4_5_moe": {"moe_layer_end_index": 3},
    "falcon": {"new_decoder_architecture": True, "alibi": False},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_rms_norm": True},
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _GEMMA4 | _GEMMA4_EXPERTS,
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe": {"use_qk_norm": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoe_swa": {"shared_intermediate_size": 32},
    "granitemoehybrid": {
        "layer_types": _LINEAR_AND_FULL,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16, "embedding_scale": 8.0},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v4": {"indexer_types": ["full", "full", "shared", "shared"]},
    "inkling2_text": {"n_layers_per_attn_res_block": 2, "log_scaling_n_floor": 16},
    "inkling_text": {"mlp_layer_types": _DENSE_FIRST, "log_scaling_n_floor": 16, "logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_attention_heads_per_layer": [4, 8, 4, 8],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3], "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention", "conv"]},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * 2, "mlp_layer_types": _DENSE_FIRST},
    "minicpm3": {"dim_model_base": 64},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": _DENSE_FIRST,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": _SLIDING_AND_FULL},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"use_mamba_kernels": False},
    "olmo": {"clip_qkv": 8.0},
    "olmoe": {"clip_qkv": 8.0},
    "opt": {"word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {"qk_layernorm": True},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "layer_types": _SLIDING_AND_FULL, "sliding_window": 8},
    "qwen2_moe": {
        "use_sliding_window": True,
        "layer_types": _SLIDING_AND_FULL,
        "sliding_window": 8,
        "mlp_only_layers": [0],
    },
    "qwen3": {"use_sliding_window": True, "layer_types": _SLIDING_AND_FULL, "sliding_window": 8},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "num_key_value_heads": 1},
    "rwkv": {"rescale_every": 2},
    "smollm3": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "full_attention", "full_attention", "sliding_attention"],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 4, "num_heads": 2},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "use_mamba_kernels": False,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "num_experts_per_tok": 1, "sliding_window": 8},
    # Text decoders beside towers for images or sound, as they are published.
    "dots3_note": {
        "text_config": _DOTS3_NOTE,
        "vision_config": {
            "num_hidden_layers": 2,
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
            "mlp_layer_types": ["dense", "sparse"],
            "per_layer_config": {1: {"num_local_experts": 4, "num_experts_per_tok": 2}},
        },
        "audio_config": {
            "downsample_hidden_size": 16,
            "adapter_input_size": 64,
            "adapter_out_dim": 64,
            "num_key_value_heads": 4,
        },
    },
    "emu3": {
        "vq_config": {"codebook_size": 32, "embed_dim": 4, "base_channels": 32, "hidden_size": 64},
        "vocabulary_map": {"<image>": 0},
    },
    "fuyu": {"text_config": {"model_type": "persimmon"}, "patch_size": 8, "image_size": 32, "image_token_id": 510},
    "gemma3": {
        "vision_config": _PATCHES,
        "mm_tokens_per_image": 4,
        "image_token_index": 510,
        "boi_token_index": 508,
        "eoi_token_index": 509,
    },
    "gemma3n": {"text_config": _GEMMA3N, "image_token_id": 510, "audio_token_id": 511},
    "gemma4": {
        "text_config": _GEMMA4 | _GEMMA4_EXPERTS,
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "position_embedding_size": 64,
        },
        "audio_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "subsampling_conv_channels": [16, 8],
            "output_proj_dims": 64,
        },
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            **shrunk(Gemma4TextConfig()),
            **_GEMMA4_DRAFTER,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        },
        "backbone_hidden_size": 64,
    },
    "gemma4_unified": {
        "text_config": _GEMMA4,
        "vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
    },
    "gemma4_unified_assistant": {"text_config": _GEMMA4_DRAFTER, "backbone_hidden_size": 64},
    "git": {"vision_config": _PATCHES},
    "got_ocr2": {
        "vision_config": {
            "output_channels": 16,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "mlp_dim": 96,
            "global_attn_indexes": [1, 3],
        },
        "image_token_index": 510,
    },
    "llama4": {
        "text_config": _LLAMA4,
        "vision_config": {**_PATCHES, "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64},
    },
    "mllama": {
        "text_config": {"cross_attention_layers": [1, 3]},
        "vision_config": {
            **_PATCHES,
            "num_global_layers": 1,
            "intermediate_layers_indices": [1, 2],
            "vision_output_dim": 192,
        },
        "image_token_index": 510,
    },
    "moshi": {
        "num_key_value_heads": 4,
        "audio_vocab_size": 32,
        "audio_encoder_config": {
            **_SMALL_AUDIO_CODEC,
            "num_quantizers": 4,
            "vector_quantization_hidden_dimension": 16,
            "upsample_groups": 16,
            "num_hidden_layers": 1,
        },
        "depth_decoder_config": {"input_size": 64, "audio_vocab_size": 32, "num_hidden_layers": 1, "num_codebooks": 4},
        "num_codebooks": 4,
    },
    "moss_transcribe_diarize": {
        "audio_config": {"num_mel_bins": 16, "max_source_positions": 64},
        "audio_token_id": 510,
    },
    "musicgen": {"audio_encoder": _SMALL_AUDIO_CODEC | {"hidden_size": 16}, "decoder": {"vocab_size": 32}},
    "musicgen_melody": {"audio_encoder": _SMALL_AUDIO_CODEC | {"hidden_size": 16}, "decoder": {"vocab_size": 32}},
    "phi4_multimodal": {
        "vision_config": {**_PATCHES, "crop_size": 32, "image_token_id": 510},
        "audio_config": {
            "num_blocks": 2,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 8,
            "input_size": 16,
            "bias_max_distance": 16,
            "audio_token_id": 511,
        },
    },
    "qwen3_5": {"vision_config": _QWEN_VISION, "image_token_id": 508, "video_token_id": 509},
    "qwen3_5_moe": {"vision_config": _QWEN_VISION, "image_token_id": 508, "video_token_id": 509},
    "qwen4_exp": {"text_config": _QWEN4, "vision_config": _QWEN_VISION, "image_token_id": 508, "video_token_id": 509},
}

PUBLISHED_AS: dict[str, str] = {
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "emu3": "Emu3ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "prophetnet": "ProphetNetForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
}
"""The class of published checkpoints where it is not the one that AutoModelForCausalLM loads them in."""

INCOMPLETE: dict[str, str] = {
    "bart": "BartForConditionalGeneration",
    "bigbird_pegasus": "BigBirdPegasusForConditionalGeneration",
    "blenderbot": "BlenderbotForConditionalGeneration",
    "blenderbot-small": "BlenderbotSmallForConditionalGeneration",
    "marian": "MarianMTModel",
    "mbart": "MBartForConditionalGeneration",
    "moshi": "MoshiForConditionalGeneration",
    "mvp": "MvpForConditionalGeneration",
    "pegasus": "PegasusForConditionalGeneration",
    "plbart": "PLBartForConditionalGeneration",
    "llama": "LlamaForSequenceClassification",
    "bert": "BertForSequenceClassification",
    "qwen3": "Qwen3Model",
}
"""Classes whose checkpoints AutoModelForCausalLM loads without complaint, and leaves weights of the model random.

The encoder-decoders share one embedding, whose name it does not look for; the others are wrappers under other names,
classifiers, and a model without a head.
"""

_ENCODER = {"is_decoder": False}

NOT_CAUSAL: dict[str, dict[str, Any]] = {
    **{name: _ENCODER for name, settings in FAMILIES.items() if settings.get("is_decoder") and name != "reformer"},
    "cpmant": {},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "gemma": {"use_bidirectional_attention": True},
    "gemma3_text": {"use_bidirectional_attention": True},
    "gemma4_text": {"use_bidirectional_attention": "all"},
    "xlm": {"causal": False},
    "xlnet": {"attn_type": "bi"},
}
"""Settings with which a type sees the answer while it predicts it: encoders as they are published, embedding models."""
