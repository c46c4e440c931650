"""Models for tests: the demo's real one, and random ones of the same kind that are small enough to run in a moment."""

from __future__ import annotations

import functools
from pathlib import Path

from examples.safety.base_model import base_model, cache_dir

_CACHE = cache_dir()
"""Taken before any test gives the code under test a cache of its own."""


@functools.cache
def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct; converted into the cache on the first use of this machine."""
    return base_model(_CACHE)


def random_llama(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """A Llama model with random float32 weights and SmolLM2's tokenizer and chat template, saved in `folder`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
