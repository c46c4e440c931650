"""The model that is measured: one that exists, or random weights of a size, since speed does not depend on values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.gpu.contact_models import llama_config
from benchmarks.gpu.devices import NotMeasurableError
from finetune_trainer.errors import JobError
from finetune_trainer.storage import fetch_model
from tests.models import smollm2_folder

_SIZES = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")


def existing_model(name: str | None) -> Path:
    """Folder of a model: its own, or that of the Hub's cache. None for SmolLM2-135M-Instruct.

    Raises:
        NotMeasurableError: it cannot be had.
    """
    if name is None:
        return smollm2_folder()
    try:
        return fetch_model(name).path
    except JobError as error:
        raise NotMeasurableError(error.message) from error


def random_model(folder: Path, sizes: list[int], device: torch.device) -> Path:
    """A Llama with random bfloat16 weights and SmolLM2's tokenizer, saved in `folder`.

    Args:
        folder: an empty folder.
        sizes: layers, hidden, intermediate, heads, kv_heads, vocab.
        device: where the weights are drawn; a GPU is much faster at it.

    Raises:
        NotMeasurableError: the sizes do not fit each other, or the tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    config = _config(sizes, tokenizer)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(sizes: list[int], tokenizer: Any) -> LlamaConfig:
    if len(sizes) != len(_SIZES) or min(sizes) < 1:
        raise NotMeasurableError(f"--random wants {len(_SIZES)} positive numbers: {', '.join(_SIZES)}.")
    _, hidden, _, heads, kv_heads, vocab = sizes
    if hidden % heads or heads % kv_heads or hidden // heads % 2:
        raise NotMeasurableError("--random: heads must divide hidden into even parts, and kv_heads must divide heads.")
    if vocab < len(tokenizer):
        raise NotMeasurableError(f"--random: SmolLM2's tokenizer needs a vocab of at least {len(tokenizer)}.")
    return llama_config(
        sizes,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
