"""Random models of Llama's kind with an adapter, made on the device they run on, and rows for them: no file is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.batch import TokenPair

LLAMA_3_8B = (32, 4096, 14336, 32, 8, 128256)
"""Layers, hidden size, intermediate size, heads, heads of keys, vocabulary."""


def llama_config(sizes: Sequence[int], **others: Any) -> LlamaConfig:
    """A Llama of these sizes, in the order of LLAMA_3_8B; `others` are further keys of its configuration."""
    layers, hidden, intermediate, heads, kv_heads, vocabulary = sizes
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **others,
    )


def random_base(sizes: tuple[int, int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen base model with weights that are as large as a trained one's."""
    config = llama_config(
        sizes, max_position_embeddings=131072, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def with_adapter(base: Any, device: torch.device, *, dropout: float = 0.0) -> AdaptedModel:
    """`base` with an adapter in float32 that changes what it says."""
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return AdaptedModel(get_peft_model(base, config).to(device), device)


def rows(count: int, *, shared: int, own: int, vocabulary: int, seed: int = 0) -> list[list[TokenPair]]:
    """Rows that begin with the same `shared` tokens; the last quarter of about `own` others is trained."""
    generator = np.random.default_rng(seed)
    beginning = generator.integers(3, vocabulary, shared)
    found = []
    for _ in range(count):
        length = int(generator.integers(max(2, own * 3 // 4), own + 1))
        ids = np.concatenate([beginning, generator.integers(3, vocabulary, length)]).astype(np.int64)
        found.append([(ids, np.arange(len(ids)) >= shared + length * 3 // 4)])
    return found
