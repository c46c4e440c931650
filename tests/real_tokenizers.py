"""Real tokenizers without a hub, as Hugging Face tokenizers: Llama 3's, Mistral's and SmolLM2's.

They differ in all that matters here: byte-level BPE with and without an automatic BOS, and SentencePiece's leading
space.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from finetune_trainer.data.tokenizer import ModelTokenizer, automatic_bos

_LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@functools.cache
def llama_3() -> ModelTokenizer:
    """Llama 3's: byte-level BPE, adds <|begin_of_text|>; </s> is ordinary text to it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    named = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    named += ["<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    named += ["<|eot_id|>", "<|python_tag|>"]
    special = named + [f"<|reserved_special_token_{number}|>" for number in range(2, 247)]
    path = str(files("llama_models").joinpath("llama3/tokenizer.model"))
    converter: Any = TikTokenConverter(vocab_file=path, pattern=_LLAMA_3_PATTERN, extra_special_tokens=special)
    backend = converter.converted()
    bos = "<|begin_of_text|>"
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return _model(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|end_of_text|>"))


@functools.cache
def mistral() -> ModelTokenizer:
    """Mistral 7B v0.1's: SentencePiece with a leading space, adds <s>."""
    from transformers import AutoTokenizer

    folder = Path(tempfile.mkdtemp(prefix="mistral-tokenizer-"))
    source = files("mistral_common").joinpath("data/tokenizer.model.v1")
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": True, "add_bos_token": True}))
    try:
        return _model(AutoTokenizer.from_pretrained(folder))
    finally:
        shutil.rmtree(folder)


@functools.cache
def smollm2() -> ModelTokenizer:
    """SmolLM2's: byte-level BPE with ChatML's special tokens, adds no BOS."""
    from transformers import AutoTokenizer

    from tests.models import smollm2_folder

    return _model(AutoTokenizer.from_pretrained(smollm2_folder()))


def _model(tokenizer: Any) -> ModelTokenizer:
    return ModelTokenizer(tokenizer, automatic_bos(tokenizer))
