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


@functools.cache
def prepends_by_normalizer() -> ModelTokenizer:
    """As Llama 2's: the normalizer puts a space in front and replaces all spaces, and nothing splits words."""

    def change(content: dict[str, Any]) -> None:
        steps = [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
        content["pre_tokenizer"] = None

    return _variant(mistral(), change)


@functools.cache
def searches_normalized_text() -> ModelTokenizer:
    """Special tokens are searched after normalization, so they do not cut the text before everything else."""

    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "NFC"}
        for token in content["added_tokens"]:
            token["normalized"] = True

    return _variant(smollm2(), change)


@functools.cache
def knows_no_capitals() -> ModelTokenizer:
    """The vocabulary lacks Q and Z: an unknown character becomes <|endoftext|>, which is a special token elsewhere."""

    def change(content: dict[str, Any]) -> None:
        model = content["model"]
        for letter in "QZ":
            model["vocab"][f"lacking-{letter}"] = model["vocab"].pop(letter)
        model["merges"] = [pair for pair in model["merges"] if not set("QZ") & set("".join(pair))]
        model["vocab"] = {
            (f"lacking-{text}" if set("QZ") & set(text) and not text.startswith("lacking-") else text): token
            for text, token in model["vocab"].items()
        }
        model["unk_token"] = "<|endoftext|>"

    return _variant(smollm2(), change)


VARIANTS: dict[str, Callable[[], ModelTokenizer]] = {
    "trims offsets": trims_offsets,
    "normalizes": normalizes,
    "swallows space": swallows_space,
    "prepends by normalizer": prepends_by_normalizer,
    "searches normalized text": searches_normalized_text,
    "knows no Q and Z": knows_no_capitals,
}
"""Their decoded text is not always the text."""

ALL = {**REAL, **VARIANTS}
