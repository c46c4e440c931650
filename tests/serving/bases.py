"""Base models for a real server: random weights, real tokenizers, and sizes that vLLM's attention on CPUs takes.

Weights are large. A model this small then learns a few conversations by heart within seconds, and what it generates
does not hang on rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.real_tokenizers import llama_3, mistral, smollm2

HIDDEN, HEAD, LAYERS = 64, 32, 2


def llama(folder: Path) -> Path:
    """Llama with SmolLM2's tokenizer, whose eos is ChatML's <|im_end|>."""
    from transformers import LlamaConfig

    return _save(folder, LlamaConfig, smollm2().tokenizer)


def untied_llama(folder: Path) -> Path:
    """Llama with the tokenizer of Llama 3's base models, whose eos ends no turn, and with a head of its own."""
    from transformers import LlamaConfig

    return _save(folder, LlamaConfig, llama_3().tokenizer, tie_word_embeddings=False)


def mistral_7b(folder: Path) -> Path:
    """Mistral with the tokenizer of Mistral 7B."""
    from transformers import MistralConfig

    return _save(folder, MistralConfig, mistral().tokenizer, sliding_window=None)


def qwen_2(folder: Path) -> Path:
    """Qwen2 with the tokenizer of Llama 3's base models."""
    from transformers import Qwen2Config

    return _save(folder, Qwen2Config, llama_3().tokenizer, head_dim=None, tie_word_embeddings=False)


def qwen_3_moe(folder: Path) -> Path:
    """A mixture of four experts with SmolLM2's tokenizer."""
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _save(folder, Qwen3MoeConfig, smollm2().tokenizer, **experts)


def mixtral(folder: Path) -> Path:
    """A mixture of another make, with SmolLM2's tokenizer."""
    from transformers import MixtralConfig

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _save(folder, MixtralConfig, smollm2().tokenizer, sliding_window=None, **experts)


def gemma_3(folder: Path) -> Path:
    """Gemma 3 as it is published: a text model within one that sees, with an image processor; SmolLM2's tokenizer."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        PreTrainedTokenizerFast,
    )

    plain = smollm2().tokenizer
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str()),
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        chat_template=plain.chat_template,
        extra_special_tokens=images,
    )
    text = {**_sizes(tokenizer), "sliding_window": 64, "query_pre_attn_scalar": HEAD, "pad_token_id": None}
    vision = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
    config_class: Any = Gemma3Config
    config = config_class(
        text_config=text,
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(images["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(images["eoi_token"]),
        image_token_index=tokenizer.convert_tokens_to_ids(images["image_token"]),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    _random(lambda: Gemma3ForConditionalGeneration(config)).save_pretrained(folder)
    Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}), tokenizer, image_seq_length=4
    ).save_pretrained(folder)
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "llama": llama,
    "untied-llama": untied_llama,
    "mistral": mistral_7b,
    "gemma-3": gemma_3,
    "qwen-2": qwen_2,
    "qwen-3-moe": qwen_3_moe,
    "mixtral": mixtral,
}


def _sizes(tokenizer: Any) -> dict[str, Any]:
    # No pad token: its row of the embedding would be zero, also where it is what ends an answer.
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _save(folder: Path, config_class: Any, tokenizer: Any, **settings: Any) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    sizes = {"tie_word_embeddings": True, **_sizes(tokenizer), **settings}
    config = config_class(
        **{name: value for name, value in sizes.items() if value is not None or name not in _sizes(tokenizer)}
    )
    _random(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _random(make: Callable[[], Any]) -> Any:
    """The same model in every run, its embeddings larger still."""
    import torch

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        tables = {id(table): table for table in (model.get_input_embeddings(), model.get_output_embeddings())}
        for weight in {id(table.weight): table.weight for table in tables.values()}.values():
            weight.mul_(2)
    return model
