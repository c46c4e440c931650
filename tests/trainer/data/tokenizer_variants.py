"""Real tokenizers and variants of them with the peculiarities of other published ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from finetune_trainer.data.tokenizer import ModelTokenizer, automatic_bos
from tests.real_tokenizers import llama_3, mistral, smollm2

REAL: dict[str, Callable[[], ModelTokenizer]] = {"llama 3": llama_3, "mistral": mistral, "smollm2": smollm2}


def _variant(original: ModelTokenizer, change: Callable[[dict[str, Any]], None]) -> ModelTokenizer:
    """A copy of `original` whose tokenizer.json was changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(original.tokenizer.backend_tokenizer.to_str())
    change(content)
    backend = Tokenizer.from_str(json.dumps(content))
    names = {"bos_token": original.tokenizer.bos_token, "eos_token": original.tokenizer.eos_token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    return ModelTokenizer(tokenizer, automatic_bos(tokenizer))


@functools.cache
def trims_offsets() -> ModelTokenizer:
    """As GPT-NeoX's: white space is left out of the offsets."""

    def change(content: dict[str, Any]) -> None:
        content["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }

    return _variant(smollm2(), change)


@functools.cache
def normalizes() -> ModelTokenizer:
    """As Qwen's: text is normalized to NFC first, so that characters of prompt and answer may become one."""
    return _variant(smollm2(), lambda content: content.update(normalizer={"type": "NFC"}))


@functools.cache
def swallows_space() -> ModelTokenizer:
    """As Phi-3's: special tokens take the white space after them."""

    def change(content: dict[str, Any]) -> None:
        for token in content["added_tokens"]:
            token["rstrip"] = True

    return _variant(smollm2(), change)


def _prepend(content: dict[str, Any]) -> None:
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    content["pre_tokenizer"] = None


@functools.cache
def prepends_by_normalizer() -> ModelTokenizer:
    """As Llama 2's: the normalizer puts a space in front and replaces all spaces, and nothing splits words."""
    return _variant(mistral(), _prepend)


@functools.cache
def searches_normalized_text() -> ModelTokenizer:
    """As older conversions of Llama 2's: special tokens are searched after that, so text behind them gets no space."""

    def change(content: dict[str, Any]) -> None:
        _prepend(content)
        for token in content["added_tokens"]:
            token["normalized"] = True

    return _variant(mistral(), change)


@functools.cache
def prepends_to_the_first() -> ModelTokenizer:
    """As newer Llama 2's: only what the text begins with gets a space, which depends on where a piece stood in it."""

    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }

    return _variant(mistral(), change)


@functools.cache
def lacks_characters() -> ModelTokenizer:
    """Characters without a token become <unk>, a special token that does not stand in the text."""
    return _variant(mistral(), lambda content: content["model"].update(byte_fallback=False, unk_token="<unk>"))


VARIANTS: dict[str, Callable[[], ModelTokenizer]] = {
    "trims offsets": trims_offsets,
    "normalizes": normalizes,
    "swallows space": swallows_space,
    "prepends by normalizer": prepends_by_normalizer,
    "prepends to the first": prepends_to_the_first,
    "searches normalized text": searches_normalized_text,
    "lacks characters": lacks_characters,
}
"""Their decoded text is not always the text."""

ALL = {**REAL, **VARIANTS}
