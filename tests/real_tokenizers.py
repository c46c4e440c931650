"""Real tokenizers without a hub, as Hugging Face tokenizers: Llama 3's, Mistral's and SmolLM2's; and chat templates.

They differ in all that matters here: byte-level BPE with and without an automatic BOS, and SentencePiece's leading
space. The templates are those of published models that TRL carries.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import tempfile
from copy import copy
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


_SPECIAL = re.compile(r"<\|[^|<>{}'\" ]+\|>|</?s>|<(?:start|end)_of_\w+>|<｜[^<>]+｜>|<turn\|>|<\|turn>")


@functools.cache
def published_templates() -> dict[str, ModelTokenizer]:
    """Chat templates of published models by name, on a tokenizer with all their special tokens and an eos of its own.

    As base models are published: <|endoftext|> is the eos, whatever the template ends a turn with.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    texts = {file.stem: file.read_text() for file in folder.glob("*.jinja") if "training" not in file.stem}
    backend = type(smollm2().tokenizer.backend_tokenizer).from_str(smollm2().tokenizer.backend_tokenizer.to_str())
    special = sorted({token for text in texts.values() for token in _SPECIAL.findall(text)})
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")
    return {name: with_template(_model(tokenizer), text) for name, text in texts.items()}


def with_template(model: ModelTokenizer, template: str) -> ModelTokenizer:
    """The same tokenizer with another chat template."""
    tokenizer = copy(model.tokenizer)
    tokenizer.chat_template = template
    return ModelTokenizer(tokenizer, model.automatic_bos)


def _model(tokenizer: Any) -> ModelTokenizer:
    return ModelTokenizer(tokenizer, automatic_bos(tokenizer))
