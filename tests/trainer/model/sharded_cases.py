"""What test_sharding.py has several processes do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """A model that is trained shared and whole."""

    family: str
    dropout: float = 0.0
    checkpointing: bool = False
    apart: bool = False
    """The head is run behind the decoder, in chunks whose gradients are taken at once, as packs are."""
    own_rows: bool = False
    """Each process has rows of its own, one of them a single token that counts for nothing."""
    experts: bool = False


TRAININGS = {
    "dropout": Training("llama", dropout=0.1),
    "checkpointing": Training("llama", dropout=0.1, checkpointing=True),
    "head apart": Training("llama", dropout=0.1, apart=True),
    "head apart, checkpointing": Training("llama", dropout=0.1, apart=True, checkpointing=True),
    "own rows": Training("llama", own_rows=True),
    "own rows, head apart, checkpointing": Training("llama", own_rows=True, apart=True, checkpointing=True),
    "learned positions": Training("gpt2", checkpointing=True),
    "embedded outside the decoder": Training("gemma4"),
    "experts": Training("qwen3_moe", experts=True, checkpointing=True),
    "layers with shared parts": Training("zamba2", checkpointing=True),
    "linear attention": Training("qwen3_next"),
}

LOADINGS = {
    "tied": "llama",
    "sliding windows": "gemma3_text",
    "towers": "gemma3",
    "experts stacked": "qwen3_moe",
    "experts of another name": "mixtral",
    "state space": "jamba",
    "learned positions": "gpt2",
    "parts in float32": "deepseek_v3",
    "shared parts": "zamba2",
    "own code": "own",
}
"""Model types, in bfloat16."""
